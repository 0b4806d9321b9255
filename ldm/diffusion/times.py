"""Training-time distributions, as quantile functions: uniform random u in (0, 1) goes in, a time comes out.

Where u comes from (a draw for every sample, or a sequence that spreads over the batch) is not their business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ldm.diffusion.schedules import DiscreteSchedule, Schedule


class Times(ABC):
    """A distribution of training times."""

    def check(self, schedule: Schedule) -> None:  # noqa: B027 - most have nothing to check
        """Raises ValueError where this distribution does not fit the schedule."""

    @abstractmethod
    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        """Times (B,) in (0, t_max] from u (B,) in (0, 1)."""


class Uniform(Times):
    """t uniform over [t_min, t_max]."""

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        return schedule.t_min + u * (schedule.t_max - schedule.t_min)


class UniformSteps(Times):
    """One of the T training steps, as DDPM, LDM and Stable Diffusion train (Ho et al. 2020, algorithm 1).

    Args:
        num_lowest: of the steps with the least noise so many alone; the refiner of SDXL learns 200 of 1000.
    """

    def __init__(self, *, num_lowest: int | None = None) -> None:
        if num_lowest is not None and num_lowest < 1:
            raise ValueError(f"got times.num_lowest={num_lowest}, expected at least 1, or null for all")
        self.num_lowest = num_lowest

    def check(self, schedule: Schedule) -> None:
        if not isinstance(schedule, DiscreteSchedule):
            raise ValueError(
                f"got times uniform_steps with {type(schedule).__name__}, expected a schedule of discrete steps "
                "(linear, scaled_linear, cosine); set times=uniform"
            )
        if self.num_lowest is not None and self.num_lowest > schedule.num_steps:
            raise ValueError(f"got times.num_lowest={self.num_lowest}, expected at most {schedule.num_steps}")

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        assert isinstance(schedule, DiscreteSchedule)
        num = self.num_lowest or schedule.num_steps
        index = (u * num).floor().clamp(max=num - 1)
        return (index + 1) / schedule.num_steps


class LogitNormal(Times):
    """t / t_max = sigmoid(mean + std n), n normal: few times near the ends (Esser et al. 2024, eq. 19)."""

    def __init__(self, *, mean: float = 0.0, std: float = 1.0) -> None:
        if std <= 0:
            raise ValueError(f"got times.std={std}, expected a positive number")
        self.mean, self.std = mean, std

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)) * schedule.t_max
        return t.clamp_min(schedule.t_min)


class LogNormal(Times):
    """sigma / alpha = exp(p_mean + p_std n), n normal (Karras et al. 2022, table 1)."""

    def __init__(self, *, p_mean: float = -1.2, p_std: float = 1.2) -> None:
        if p_std <= 0:
            raise ValueError(f"got times.p_std={p_std}, expected a positive number")
        self.p_mean, self.p_std = p_mean, p_std

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        ratio = torch.exp(self.p_mean + self.p_std * torch.special.ndtri(u))
        return schedule.time_of(ratio).clamp(max(schedule.t_min, 1e-6), schedule.t_max)
