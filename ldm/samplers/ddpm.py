"""Ancestral sampling as in DDPM."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ldm.samplers.base import Process, Sampler
from ldm.samplers.ddim import posterior_variance


class DDPM(Sampler):
    """Samples x_s ~ q(x_s | x_t, x_0) with the predicted x_0 (Ho et al. 2020, algorithm 2).

    Args:
        variance: "small" is that of q(x_s | x_t, x_0), optimal for a point of data; "large" is optimal for unit normal
            data, on variance-preserving schedules that of q(x_t | x_s) (their section 3.2).
    """

    def __init__(self, *, variance: Literal["small", "large"] = "small") -> None:
        if variance not in ("small", "large"):
            raise ValueError(f"got sampler.variance={variance}, expected small or large")
        self.variance = variance

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x_0, eps = process.evaluate(x, t)
        alpha, sigma = process.schedule.alpha, process.schedule.sigma
        small = posterior_variance(process, t, s)
        mean = alpha(s) * x_0 + (sigma(s) ** 2 - small).clamp_min(0).sqrt() * eps
        if sigma(s) == 0:
            return mean
        variance = small if self.variance == "small" else large_variance(process, t, s)
        return mean + variance.sqrt() * process.noise()


def large_variance(process: Process, t: Tensor, s: Tensor) -> Tensor:
    """The variance of p(x_s | x_t) for unit normal data: that of q(x_t | x_s) times var(x_s) / var(x_t)."""
    alpha, sigma = process.schedule.alpha, process.schedule.sigma
    forward = sigma(t) ** 2 - (alpha(t) / alpha(s) * sigma(s)) ** 2
    return forward * (alpha(s) ** 2 + sigma(s) ** 2) / (alpha(t) ** 2 + sigma(t) ** 2)
