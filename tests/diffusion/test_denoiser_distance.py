"""The distance that the diffusion loss takes, and where."""

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


class AnswersInPart(Answers):
    """Drops half of the places while it trains, the left ones."""

    @property
    def drops_patches(self) -> bool:
        return self.training

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if not self.training:
            return self.answer
        given = torch.tensor([0.0, 1.0, 1.0]).expand(4, 1, 3, 3)
        return torch.cat([self.answer * given, given], dim=1)


def loss(distance: str, *, network: type[Answers] = Answers, training: bool = True) -> tuple[Tensor, Tensor]:
    """(The loss of a fixed answer, answer minus noise)."""
    x_0, eps, answer = torch.randn(3, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser(
        network(answer).train(training),
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


@pytest.mark.parametrize("distance", ["square", "absolute"])
def test_the_loss_is_a_mean_over_the_places_that_a_network_answers_for(distance: str) -> None:
    found, error = loss(distance, network=AnswersInPart)
    there = error[..., 1:]
    assert_close(found, (there.square() if distance == "square" else there.abs()).flatten(1).mean(1))


def test_a_network_that_drops_places_in_training_has_its_whole_loss_in_evaluation() -> None:
    found, error = loss("square", network=AnswersInPart, training=False)
    assert_close(found, error.square().flatten(1).mean(1), rtol=0, atol=0)


def test_another_distance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got model\.denoiser\.distance='l1', expected one of square, absolute"):
        loss("l1")
