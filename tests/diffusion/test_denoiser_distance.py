"""The distance that the diffusion loss takes."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.diffusion import Conditioning, Denoiser, parameterizations, schedules, times, weightings


class Answers(nn.Module):
    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.answer


def loss(distance: str) -> tuple[Tensor, Tensor]:
    """(The loss of a fixed answer, answer minus noise)."""
    x_0, eps, answer = torch.randn(3, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser(
        Answers(answer),
        schedule=schedules.ScaledLinear(),
        parameterization=parameterizations.Epsilon(),
        weighting=weightings.Unit(),
        times=times.Uniform(),
        distance=distance,
    )
    return denoiser.loss(x_0, eps, torch.full((4,), 0.5), Conditioning()), answer - eps


def test_the_absolute_distance_is_the_mean_absolute_error_of_the_output() -> None:
    found, error = loss("absolute")
    assert_close(found, error.abs().flatten(1).mean(1))


def test_the_square_is_the_default_one() -> None:
    found, error = loss("square")
    assert_close(found, error.square().flatten(1).mean(1))


def test_another_distance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got model\.denoiser\.distance='l1', expected one of square, absolute"):
        loss("l1")
