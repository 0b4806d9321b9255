"""Which times a sampler visits: num_steps of them, falling, and then the end.

Those that spread steps evenly over time are here, with the conventions of CompVis's code and of diffusers by name:
`Linspace`, `Leading`, `CompVis`, `Trailing`, `DistilledSteps`, `Shifted`. Those that spread noise levels are in
`noise_levels`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion import Schedule
from ldm.diffusion.schedules import DiscreteSchedule, RectifiedFlow


class Discretization(ABC):
    """Places sampling times on a schedule."""

    @abstractmethod
    def times(self, num_steps: int, schedule: Schedule) -> Tensor:
        """(num_steps,) falling times, float64, the last one above the end; `CompVis` may have more."""

    def end(self, schedule: Schedule) -> float:
        """Where sampling ends: 0, the data, or for some published conventions t_min."""
        return 0.0

    def __call__(self, num_steps: int, schedule: Schedule) -> Tensor:
        """(num_steps + 1,) falling times, float32, that end in `end`.

        Raises:
            ValueError: num_steps is not a positive number, or more than the schedule has training steps.
        """
        if num_steps < 1:
            raise ValueError(f"got {num_steps} sampling steps, expected at least 1")
        if isinstance(schedule, DiscreteSchedule) and num_steps > schedule.num_steps:
            raise ValueError(
                f"got {num_steps} sampling steps, expected at most the {schedule.num_steps} that were trained"
            )
        times = self.times(num_steps, schedule)
        return torch.cat([times, times.new_tensor([self.end(schedule)])]).float()


class Linspace(Discretization):
    """Evenly from t_max to t_min; on discrete schedules rounded to training steps.

    Args:
        endpoint: whether t_min is among the times, as in diffusers' DDIM; its DPM-Solver, UniPC and DEIS leave it out,
            since the step from t_min to 0 is far longer in log(sigma / alpha) than those before it.
        last_step: of continuous schedules, the time at which the last step begins, which the others come to evenly;
            None is as long as the others. SiT takes 0.04 (Ma et al. 2024, table 10).

    Raises:
        ValueError: in a call, a last step that the schedule has no place for.
    """

    def __init__(self, *, endpoint: bool = True, last_step: float | None = None) -> None:
        self.endpoint, self.last_step = endpoint, last_step

    def times(self, num_steps: int, schedule: Schedule) -> Tensor:
        if self.last_step is not None:
            return self._to_last_step(self.last_step, num_steps, schedule)
        if schedule.t_min == 0:
            return torch.linspace(schedule.t_max, 0, num_steps + 1, dtype=torch.float64)[:-1]
        # One step starts at t_max, where numpy would take the other end.
        num = max(num_steps if self.endpoint else num_steps + 1, 2)
        if not isinstance(schedule, DiscreteSchedule):
            return torch.linspace(schedule.t_max, schedule.t_min, num, dtype=torch.float64)[:num_steps]
        # By numpy, so that halves round as in diffusers.
        return times_of(torch.from_numpy(np.linspace(0, schedule.num_steps - 1, num).round()), schedule)[:num_steps]

    def _to_last_step(self, last: float, num_steps: int, schedule: Schedule) -> Tensor:
        if isinstance(schedule, DiscreteSchedule) or not schedule.t_min < last < schedule.t_max:
            raise ValueError(
                f"got discretization.last_step={last} on {type(schedule).__name__}, expected null, or on a schedule "
                f"without training steps a time between {schedule.t_min:g} and {schedule.t_max:g}"
            )
        if num_steps < 2:
            raise ValueError(f"got {num_steps} sampling step with discretization.last_step, expected at least 2")
        return torch.linspace(schedule.t_max, last, num_steps, dtype=torch.float64)


class Leading(Discretization):
    """Training steps k * (T // num_steps) + offset for k = num_steps - 1, ..., 0, as in diffusers' "leading".

    Args:
        offset: added to every index; 1 for Stable Diffusion ("steps_offset").
        endpoint: whether k = 0 is among them, as in diffusers' DDIM and PNDM; its DPM-Solver, UniPC and DEIS take
            k = num_steps, ..., 1 of T // (num_steps + 1) instead.
        end: "t_min" ends at training index 0 ("set_alpha_to_one=False", Stable Diffusion), "zero" at the data.
    """

    def __init__(self, *, offset: int = 1, endpoint: bool = True, end: Literal["t_min", "zero"] = "t_min") -> None:
        if offset < 0:
            raise ValueError(f"got discretization.offset={offset}, expected 0 or more training steps")
        if end not in ("t_min", "zero"):
            raise ValueError(f"got discretization.end={end}, expected t_min or zero")
        if endpoint and offset == 0 and end == "t_min":
            raise ValueError(
                "got discretization.offset=0 and discretization.end=t_min, where the last step would stay at t_min; "
                "expected offset=1 (Stable Diffusion) or end=zero"
            )
        self.offset, self.endpoint, self.ends_at = offset, endpoint, end

    def times(self, num_steps: int, schedule: Schedule) -> Tensor:
        grid = training_steps(schedule, "leading")
        stride = grid.num_steps // (num_steps if self.endpoint else num_steps + 1)
        last = (num_steps if not self.endpoint else num_steps - 1) * stride + self.offset
        if stride == 0 or last >= grid.num_steps:
            raise ValueError(
                f"got {num_steps} sampling steps with leading times, the first of which would be training index {last} "
                f"of 0 to {grid.num_steps - 1}; expected fewer steps, or discretization=trailing"
            )
        return times_of(torch.arange(num_steps) * stride + last - (num_steps - 1) * stride, grid)

    def end(self, schedule: Schedule) -> float:
        return schedule.t_min if self.ends_at == "t_min" else 0.0


class CompVis(Discretization):
    """Training steps range(0, T, T // num_steps) + 1, ending at index 0: CompVis's `make_ddim_timesteps`, "uniform".

    There may be more than num_steps of them: 60 steps of 1000 are 63 times. Where 999 is a multiple of the stride the
    first index would be 1000, one too many; the original fails there with an index error (at 599 of the 1000 possible
    numbers of steps, among them 3, 9, 27, 36, 37, 101 to 111 and all above 500).
    """

    def times(self, num_steps: int, schedule: Schedule) -> Tensor:
        grid = training_steps(schedule, "compvis")
        index = compvis_index(num_steps, grid.num_steps)
        if int(index[-1]) == grid.num_steps:
            usable = (n for n in range(num_steps, 0, -1) if int(compvis_index(n, grid.num_steps)[-1]) < grid.num_steps)
            raise ValueError(
                f"got {num_steps} sampling steps with CompVis's times, the first of which would be training index "
                f"{grid.num_steps} of 0 to {grid.num_steps - 1}; set num_steps={next(usable)} or discretization=leading"
            )
        return times_of(index, grid)

    def end(self, schedule: Schedule) -> float:
        return schedule.t_min


class Trailing(Discretization):
    """t_max (1 - i / num_steps), which starts where all is noise (Lin et al. 2024, table 2)."""

    def times(self, num_steps: int, schedule: Schedule) -> Tensor:
        if not isinstance(schedule, DiscreteSchedule):
            return torch.linspace(schedule.t_max, 0, num_steps + 1, dtype=torch.float64)[:-1]
        # By numpy, so that halves round as in diffusers; its `arange` may yield a time too many.
        most = schedule.num_steps
        return torch.from_numpy(np.arange(most, 0, -most / num_steps)[:num_steps].round()) / most


class DistilledSteps(Discretization):
    """Some of the steps that a consistency model was distilled at, evenly by index (diffusers' LCMScheduler).

    Args:
        num_distilled: how many steps, evenly spaced up to t_max, it was distilled at.
    """

    def __init__(self, *, num_distilled: int = 50) -> None:
        if num_distilled < 1:
            raise ValueError(f"got discretization.num_distilled={num_distilled}, expected at least 1")
        self.num_distilled = num_distilled

    def times(self, num_steps: int, schedule: Schedule) -> Tensor:
        most = schedule.num_steps if isinstance(schedule, DiscreteSchedule) else self.num_distilled
        if num_steps > self.num_distilled or self.num_distilled > most:
            raise ValueError(
                f"got {num_steps} of {self.num_distilled} distilled steps, expected at most those, and those at most "
                f"{most}; set num_steps or discretization.num_distilled"
            )
        skipped = torch.arange(num_steps) * self.num_distilled // num_steps
        number = (self.num_distilled - skipped).double()
        if isinstance(schedule, DiscreteSchedule):
            return number * (schedule.num_steps // self.num_distilled) / schedule.num_steps
        return number / self.num_distilled * schedule.t_max


class Shifted(Discretization):
    """t' = shift t / (1 + (shift - 1) t) of even times t, on rectified flow (Esser et al. 2024, section 5.3.2).

    Args:
        shift: the square root of how many times more pixels there are than the noise was made for; 3 in SD3.
        lowest: the last t before the shift; None is 1 / num_steps. SD3 itself, as diffusers, takes 0.002994, the
            shifted 1/1000.
    """

    def __init__(self, *, shift: float = 3.0, lowest: float | None = None) -> None:
        if shift <= 0:
            raise ValueError(f"got discretization.shift={shift}, expected a positive number")
        if lowest is not None and not 0 < lowest < 1:
            raise ValueError(f"got discretization.lowest={lowest}, expected a time between 0 and 1, or null")
        self.shift, self.lowest = shift, lowest

    def times(self, num_steps: int, schedule: Schedule) -> Tensor:
        if not isinstance(schedule, RectifiedFlow):
            raise ValueError(
                f"got shifted times with {type(schedule).__name__}, expected the schedule rectified_flow; "
                "set discretization=trailing"
            )
        lowest = 1 / num_steps if self.lowest is None else self.lowest
        t = torch.linspace(1, lowest, num_steps, dtype=torch.float64)
        return self.shift * t / (1 + (self.shift - 1) * t)


def training_steps(schedule: Schedule, name: str) -> DiscreteSchedule:
    """The schedule, checked to have the training steps that a convention counts in."""
    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError(
            f"got discretization={name} with {type(schedule).__name__}, expected a schedule of training steps, which "
            "it counts; set discretization=trailing or linspace"
        )
    return schedule


def compvis_index(num_steps: int, num_training_steps: int) -> Tensor:
    return torch.arange(0, num_training_steps, num_training_steps // num_steps) + 1


def times_of(index: Tensor, schedule: DiscreteSchedule) -> Tensor:
    """Falling times, float64, of rising training indices."""
    return (index.double().flip(0) + 1) / schedule.num_steps
