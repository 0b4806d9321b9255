"""Which times a sampler visits: num_steps of them, falling, and then 0."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ldm.diffusion import Schedule
from ldm.diffusion.schedules import DiscreteSchedule


class Discretization(ABC):
    """Places sampling times on a schedule."""

    @abstractmethod
    def times(self, num_steps: int, schedule: Schedule) -> Tensor:
        """(num_steps,) falling times, float64, the last one above 0."""

    def __call__(self, num_steps: int, schedule: Schedule) -> Tensor:
        """(num_steps + 1,) falling times, float32, that end in 0.

        Raises:
            ValueError: num_steps is not a positive number, or more than the schedule has training steps.
        """
        if num_steps < 1:
            raise ValueError(f"got {num_steps} sampling steps, expected at least 1")
        times = self.times(num_steps, schedule)
        if isinstance(schedule, DiscreteSchedule) and num_steps > schedule.num_steps:
            raise ValueError(
                f"got {num_steps} sampling steps, expected at most the {schedule.num_steps} that were trained"
            )
        return torch.cat([times, times.new_zeros(1)]).float()


class Uniform(Discretization):
    """Evenly from t_max to t_min ("linspace"); on discrete schedules rounded to training steps."""

    def times(self, num_steps: int, schedule: Schedule) -> Tensor:
        if schedule.t_min == 0:
            return torch.linspace(schedule.t_max, 0, num_steps + 1, dtype=torch.float64)[:-1]
        return _on_grid(torch.linspace(schedule.t_max, schedule.t_min, num_steps, dtype=torch.float64), schedule)


class Trailing(Discretization):
    """t_max (1 - i / num_steps), which starts where all is noise (Lin et al. 2024, table 2)."""

    def times(self, num_steps: int, schedule: Schedule) -> Tensor:
        return _on_grid(torch.linspace(schedule.t_max, 0, num_steps + 1, dtype=torch.float64)[:-1], schedule)


class Karras(Discretization):
    """Noise levels sigma / alpha evenly spaced in their 1/rho-th power (Karras et al. 2022, eq. 5).

    Args:
        sigma_min, sigma_max: noise levels of the last and the first step; None takes those of t_min and t_max.
    """

    def __init__(self, *, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None) -> None:
        if rho <= 0:
            raise ValueError(f"got discretization.rho={rho}, expected a positive number")
        self.rho, self.sigma_min, self.sigma_max = rho, sigma_min, sigma_max

    def times(self, num_steps: int, schedule: Schedule) -> Tensor:
        low, high = self.levels(schedule)
        ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
        inverse = 1 / self.rho
        return schedule.time_of((high**inverse + ramp * (low**inverse - high**inverse)) ** self.rho)

    def levels(self, schedule: Schedule) -> tuple[float, float]:
        """(sigma_min, sigma_max), checked to be usable on this schedule."""
        ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
        known_low, known_high = schedule.ratio(ends).tolist()
        low = known_low if self.sigma_min is None else self.sigma_min
        high = known_high if self.sigma_max is None else self.sigma_max
        # Beyond the schedule's end all times are t_max; the tolerance is for levels copied from a paper.
        highest = min(known_high * 1.001, 1e4)
        if not 0 < low < high <= highest:
            raise ValueError(
                f"got noise levels from {low:g} to {high:g} for Karras times on {type(schedule).__name__}, expected "
                f"0 < sigma_min < sigma_max <= {highest:g}; set discretization.sigma_min and discretization.sigma_max, "
                "or discretization=trailing"
            )
        return low, high


def _on_grid(times: Tensor, schedule: Schedule) -> Tensor:
    """Rounds to the training steps of a discrete schedule, where the network knows what it is told."""
    if not isinstance(schedule, DiscreteSchedule):
        return times
    return (times * schedule.num_steps).round() / schedule.num_steps
