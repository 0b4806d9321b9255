"""Churn and the reverse stochastic equation beyond the laws of all samplers."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion import Prediction
from ldm.diffusion.schedules import EDM
from ldm.samplers import Churn, EulerMaruyama, Heun, Karras, UniPC


def edm_sampler(denoised: Any, x: Tensor, times: Tensor, noise: Any, options: dict[str, float]) -> Tensor:
    """Algorithm 2 of Karras et al. 2022, line by line."""
    num = len(times) - 1
    for t, t_next in pairwise(times):
        within = options["low"] <= t <= options["high"]
        gamma = min(options["churn"] / num, math.sqrt(2) - 1) if within else 0.0
        t_hat = t + gamma * t
        if gamma:
            x = x + (t_hat**2 - t**2).sqrt() * options["noise"] * noise()
        d = (x - denoised(x, t_hat)) / t_hat
        x_next = x + (t_next - t_hat) * d
        if t_next > 0:
            d_next = (x_next - denoised(x_next, t_next)) / t_next
            x_next = x + (t_next - t_hat) * (d + d_next) / 2
        x = x_next
    return x


def test_churn_around_heun_is_algorithm_2_of_the_paper() -> None:
    options = {"churn": 5.0, "low": 0.05, "high": 50.0, "noise": 1.003}
    schedule = EDM()
    times = Karras()(12, schedule).double()

    def denoised(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x / (1 + t**2))

    def draws() -> Any:
        generator = torch.Generator().manual_seed(3)
        return lambda: torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)

    start = 80 * torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = Churn(Heun(), **options)(
        lambda x, t: Prediction(denoised(x, t), (x - denoised(x, t)) / t), schedule, start, times=times, noise=draws()
    )
    assert_close(ours, edm_sampler(denoised, start, times, draws(), options), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Churn(UniPC()), r"^got sampler\.sampler=UniPC with churn, which looks back"),
        (lambda: Churn(churn=-1.0), r"^got sampler\.churn=-1\.0"),
        (lambda: Churn(low=2.0, high=1.0), r"low=2\.0, high=1\.0"),
        (lambda: EulerMaruyama(noise=-0.1), r"^got sampler\.noise=-0\.1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
