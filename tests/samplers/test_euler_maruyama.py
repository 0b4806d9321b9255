"""Euler-Maruyama is SiT's stochastic sampler, step for step."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion import Prediction
from ldm.diffusion.schedules import RectifiedFlow
from ldm.samplers import EulerMaruyama, Linspace


def believed(x: Tensor, t: Tensor) -> Prediction:
    """The expectations of x_0 and eps for x_0 of mean 0.4 and standard deviation 0.6 on the straight path."""
    surprise = (x - (1 - t) * 0.4) / ((1 - t) ** 2 * 0.36 + t**2)
    return Prediction(0.4 + (1 - t) * 0.36 * surprise, t * surprise)


def sit_sampler(x: Tensor, times: Tensor, draw: Callable[[], Tensor], *, w: float) -> Tensor:
    """Ma et al. 2024, algorithm 2, with the diffusion coefficient w sigma(t); its time runs from noise to data."""
    for start, end in pairwise(times):
        x_0, eps = believed(x, start)
        score, velocity, step = -eps / start, x_0 - eps, start - end
        x = x + step * (velocity + 0.5 * w * start * score)
        if end > 0:
            x = x + (w * start).sqrt() * step.sqrt() * draw()
    return x


def draws() -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(3)
    return lambda: torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("noise", "w"), [(1.0, 2.0), (0.5, 1.0)], ids=["released code", "paper"])
def test_steps_are_those_of_algorithm_2(noise: float, w: float) -> None:
    times = Linspace(last_step=0.04)(20, RectifiedFlow()).double()
    start = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = EulerMaruyama(noise=noise, last="mean")
    ours = sampler(believed, RectifiedFlow(), start, times=times, noise=draws())
    assert_close(ours, sit_sampler(start, times, draws(), w=w), rtol=1e-9, atol=1e-9)


def test_the_mean_of_the_last_step_has_less_noise_than_was_believed_in() -> None:
    """x_0 - noise sigma eps: the velocity takes all noise away, and the score the same again."""
    times = torch.tensor([0.04, 0.0], dtype=torch.float64)
    x = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    x_0, eps = believed(x, times[0])
    last = EulerMaruyama(noise=1.0, last="mean")(believed, RectifiedFlow(), x, times=times, noise=draws())
    assert_close(last, x_0 - 0.04 * eps)
    assert_close(EulerMaruyama()(believed, RectifiedFlow(), x, times=times, noise=draws()), x_0)
    with pytest.raises(ValueError, match=r"^got sampler\.last=eps, expected x_0 or mean"):
        EulerMaruyama(last="eps")  # type: ignore[arg-type]
