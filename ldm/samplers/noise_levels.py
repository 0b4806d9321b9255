"""Sampling times that spread noise levels sigma / alpha, whatever the times are that have them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion import Schedule
from ldm.samplers.discretizations import Discretization

# Noise levels of 10 steps and their end (Sabour et al. 2024, "Align Your Steps", as published with the paper).
ALIGNED_LEVELS = {
    "sd1": (14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092, 0.9642583904,
            0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582),
    "sdxl": (14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141, 0.5550693289,
             0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582),
    "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}  # fmt: skip


class NoiseLevels(Discretization):
    """Between two noise levels.

    Args:
        sigma_min, sigma_max: noise levels of the last and the first step; None takes those of t_min and t_max.
    """

    def __init__(self, *, sigma_min: float | None = None, sigma_max: float | None = None) -> None:
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    @abstractmethod
    def spread(self, low: float, high: float, num: int) -> Tensor:
        """(num,) noise levels, float64, falling from high to low."""

    def times(self, num_steps: int, schedule: Schedule) -> Tensor:
        return schedule.time_of(self.spread(*self.ends(schedule), num_steps))

    def ends(self, schedule: Schedule) -> tuple[float, float]:
        """(sigma_min, sigma_max), checked to be usable on this schedule."""
        known_low, known_high = known_levels(schedule)
        low = known_low if self.sigma_min is None else self.sigma_min
        high = known_high if self.sigma_max is None else self.sigma_max
        highest = highest_level(schedule)
        if not 0 < low < high <= highest:
            raise ValueError(
                f"got noise levels from {low:g} to {high:g} for {type(self).__name__} times on "
                f"{type(schedule).__name__}, expected 0 < sigma_min < sigma_max <= {highest:g}; set "
                "discretization.sigma_min and discretization.sigma_max, or discretization=trailing"
            )
        return low, high


class Karras(NoiseLevels):
    """Noise levels evenly spaced in their 1/rho-th power (Karras et al. 2022, eq. 5).

    Args:
        rho: 1 is even in the level, larger ones make shorter steps near the data.
        sigma_min, sigma_max: noise levels of the last and the first step; None takes those of t_min and t_max.
    """

    def __init__(self, *, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None) -> None:
        if rho <= 0:
            raise ValueError(f"got discretization.rho={rho}, expected a positive number")
        super().__init__(sigma_min=sigma_min, sigma_max=sigma_max)
        self.rho = rho

    def spread(self, low: float, high: float, num: int) -> Tensor:
        ramp = torch.linspace(0, 1, num, dtype=torch.float64)
        inverse = 1 / self.rho
        return (high**inverse + ramp * (low**inverse - high**inverse)) ** self.rho


class Exponential(NoiseLevels):
    """Noise levels evenly spaced in their logarithm."""

    def spread(self, low: float, high: float, num: int) -> Tensor:
        return torch.linspace(np.log(high), np.log(low), num, dtype=torch.float64).exp()


class Beta(NoiseLevels):
    """Noise levels, or times, at even quantiles of a beta distribution, dense at both ends (Lee et al. 2024).

    Args:
        alpha, beta: shape of the distribution at the low and at the high end; smaller is denser.
        over: what is so distributed: "level", sigma / alpha as in diffusers, or "time" as in the paper.
        sigma_min, sigma_max: noise levels of the last and the first step; None takes those of t_min and t_max.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.6,
        beta: float = 0.6,
        over: Literal["level", "time"] = "level",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> None:
        if not (alpha > 0 and beta > 0):
            raise ValueError(f"got discretization.alpha={alpha}, beta={beta}, expected positive numbers")
        if over not in ("level", "time"):
            raise ValueError(f"got discretization.over={over}, expected level or time")
        super().__init__(sigma_min=sigma_min, sigma_max=sigma_max)
        self.alpha, self.beta, self.over = alpha, beta, over

    def times(self, num_steps: int, schedule: Schedule) -> Tensor:
        if self.over == "level":
            return super().times(num_steps, schedule)
        low, high = schedule.time_of(torch.tensor(self.ends(schedule), dtype=torch.float64)).tolist()
        return self.spread(low, high, num_steps)

    def spread(self, low: float, high: float, num: int) -> Tensor:
        from scipy.special import betaincinv

        quantiles = betaincinv(self.alpha, self.beta, np.linspace(1, 0, num))
        return low + torch.from_numpy(quantiles) * (high - low)


class AlignYourSteps(Discretization):
    """Noise levels optimised for a model, 10 steps; other numbers interpolate their logarithm (Sabour et al. 2024).

    Args:
        model: "sd1", "sdxl" or "svd".
    """

    def __init__(self, *, model: Literal["sd1", "sdxl", "svd"] = "sd1") -> None:
        if model not in ALIGNED_LEVELS:
            raise ValueError(f"got discretization.model={model}, expected one of {', '.join(ALIGNED_LEVELS)}")
        self.model = model

    def times(self, num_steps: int, schedule: Schedule) -> Tensor:
        table = ALIGNED_LEVELS[self.model]
        if table[0] > highest_level(schedule):
            raise ValueError(
                f"got Align Your Steps for {self.model} on {type(schedule).__name__}, expected a schedule that reaches "
                f"noise level {table[0]:g}, this one ends at {known_levels(schedule)[1]:g}; set discretization=trailing"
            )
        places = np.linspace(0, 1, num_steps + 1), np.linspace(0, 1, len(table))
        levels = torch.from_numpy(np.exp(np.interp(*places, np.log(table))))
        return schedule.time_of(levels[:-1])


def known_levels(schedule: Schedule) -> tuple[float, float]:
    """The noise levels at t_min and t_max."""
    low, high = schedule.ratio(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)).tolist()
    return low, high


def highest_level(schedule: Schedule) -> float:
    """The highest noise level to ask for: beyond the schedule's end all times are t_max.

    The tolerance is for levels copied from a paper; infinite levels have no steps between them.
    """
    return min(known_levels(schedule)[1] * 1.001, 1e4)
