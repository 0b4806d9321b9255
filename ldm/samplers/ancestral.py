"""One step of the stochastic family: part of the way down in noise, and fresh noise for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion import Schedule
from ldm.samplers.base import Process


def check_eta(eta: float) -> None:
    """Raises ValueError where eta is no share of noise."""
    if not 0 <= eta <= 1:
        raise ValueError(f"got sampler.eta={eta}, expected a number from 0 (deterministic) to 1 (ancestral)")


def split(schedule: Schedule, t: Tensor, s: Tensor, *, eta: float) -> tuple[Tensor, Tensor]:
    """(down, up), noise levels sigma / alpha with down^2 + up^2 = that of s, in float64.

    A step goes down to `down` and adds noise of `up`; eta = 1 adds as much as q(x_s | x_t, x_0) has, eta = 0 none.
    """
    high, low = schedule.ratio(t.double()), schedule.ratio(s.double())
    up = eta * low * (1 - (low / high) ** 2).sqrt()
    return (low**2 - up**2).clamp_min(0).sqrt(), up


def ancestral_step(process: Process, x: Tensor, x_0: Tensor, *, t: Tensor, s: Tensor, eta: float, z: Tensor) -> Tensor:
    """x_s from x_t (B, C, H, W) and the belief x_0 in it, with noise z; finite also where alpha(t) = 0."""
    schedule, (down, up) = process.schedule, split(process.schedule, t, s, eta=eta)
    t, alpha = t.double(), schedule.alpha(s.double())
    kept = alpha * down / schedule.sigma(t)
    return kept * x + (alpha - kept * schedule.alpha(t)) * x_0 + alpha * up * z


def noise_for(process: Process, x: Tensor, s: Tensor, *, eta: float) -> Tensor:
    """The noise of a step to s: none where nothing is added, so that a deterministic run draws nothing."""
    if eta == 0 or process.schedule.sigma(s) == 0:
        return torch.zeros_like(x)
    return process.noise()


def level_between(schedule: Schedule, t: Tensor, level: Tensor) -> Tensor:
    """The time () half way, in the logarithm of sigma / alpha, between time t and a noise level."""
    return schedule.time_of((schedule.ratio(t.double()) * level).sqrt())
