"""Noise added before each step, and taken out again by it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.samplers.base import Process, Sampler
from ldm.samplers.heun import Heun
from ldm.samplers.restart import renoised


class Churn(Sampler):
    """Raises the noise level by the factor 1 + gamma before each step (Karras et al. 2022, algorithm 2).

    gamma is churn over the number of steps, at most sqrt(2) - 1, where the level is within [low, high], else 0.

    Args:
        sampler: what steps; one that does not look back.
        churn, low, high, noise: their S_churn, S_min, S_max and S_noise; the last is the standard deviation of what is
            added, a little above 1 against the detail that denoising removes.

    Raises:
        ValueError: numbers that mean nothing, or a sampler that looks back.
    """

    def __init__(
        self,
        sampler: Sampler | None = None,
        *,
        churn: float = 40.0,
        low: float = 0.05,
        high: float = 50.0,
        noise: float = 1.003,
    ) -> None:
        self.sampler = Heun() if sampler is None else sampler
        if self.sampler.looks_back:
            raise ValueError(
                f"got sampler.sampler={type(self.sampler).__name__} with churn, which looks back at earlier steps; "
                "expected one that does not, such as Heun or Euler"
            )
        if churn < 0 or noise <= 0 or not 0 <= low < high:
            raise ValueError(
                f"got sampler.churn={churn}, low={low}, high={high}, noise={noise}, expected churn >= 0, "
                "0 <= low < high and noise > 0"
            )
        self.churn, self.low, self.high, self.noise = churn, low, high, noise
        self.evaluations_per_step = self.sampler.evaluations_per_step

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        level = process.schedule.ratio(t)
        gamma = min(self.churn / process.num_steps, math.sqrt(2) - 1)
        if gamma == 0 or not self.low <= level.item() <= self.high:
            return self.sampler.step(process, x, t, s)
        raised = process.schedule.time_of(level * (1 + gamma))
        raised = torch.clamp(raised, max=process.schedule.t_max).to(t)
        if raised <= t:
            return self.sampler.step(process, x, t, s)
        return self.sampler.step(process, renoised(process, x, t, raised, std=self.noise), raised, s)
