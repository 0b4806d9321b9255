"""Restarts: now and then back up in noise, so that fresh noise contracts the errors made so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion import Schedule
from ldm.samplers.base import Process, Sampler
from ldm.samplers.heun import Heun
from ldm.samplers.lcm import LCM
from ldm.samplers.noise_levels import Karras, known_levels


@dataclass(frozen=True)
class Interval:
    """Where to go back, in noise levels sigma / alpha.

    Args:
        low, high: from where and to where.
        num_restarts: how often (K of the paper).
        num_steps: steps down again, at Karras times.
    """

    low: float
    high: float
    num_restarts: int = 2
    num_steps: int = 9

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"got a restart from {self.low} to {self.high}, expected noise levels 0 < low < high")
        if self.num_restarts < 1 or self.num_steps < 1:
            raise ValueError(
                f"got num_restarts={self.num_restarts}, num_steps={self.num_steps} of a restart, expected at least 1"
            )

    def times(self, schedule: Schedule, *, like: Tensor) -> tuple[Tensor, ...]:
        """The time of the low end, then (num_steps + 1) times from the high end down to it, each () of a dtype."""
        lowest, highest = known_levels(schedule)
        if not lowest <= self.low < self.high <= highest:
            raise ValueError(
                f"got a restart from noise level {self.low:g} to {self.high:g} on {type(schedule).__name__}, expected "
                f"levels from {lowest:g} to {highest:g}; set low and high in sampler.intervals"
            )
        times = schedule.time_of(Karras().spread(self.low, self.high, self.num_steps + 1)).to(like)
        return (times[-1], *times)


class Restart(Sampler):
    """Any one-step sampler, with restarts on the way (Xu et al. 2023, algorithm 1).

    A step that passes the low end of an interval stops there for its restarts: noise up to the high end, as the forward
    process adds it, and the sampler down again.

    Args:
        sampler: what steps; one that does not look back, since a restart leaves the path of earlier answers, and not
            LCM, which ends every way down in x_0 and not at the low end.
        intervals: where to restart; by default twice from noise level 0.1 to 2. What a task constrains is put right
            after the step, not within its restarts.
    """

    def __init__(
        self, sampler: Sampler | None = None, *, intervals: Sequence[Interval] = (Interval(0.1, 2.0),)
    ) -> None:
        self.sampler = Heun() if sampler is None else sampler
        if self.sampler.looks_back:
            raise ValueError(
                f"got sampler.sampler={type(self.sampler).__name__} for restarts, which looks back at earlier steps; "
                "expected one that does not, such as Heun, Euler or KDPM2"
            )
        if isinstance(self.sampler, LCM):
            raise ValueError(
                "got sampler.sampler=LCM for restarts, which noises its belief in x_0 anew in every step; expected one "
                "that follows the path, such as Heun, Euler or KDPM2"
            )
        self.intervals = tuple(sorted(intervals, key=lambda interval: -interval.low))
        self.evaluations_per_step = self.sampler.evaluations_per_step

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        level_t, level_s = (process.schedule.ratio(time.double()).item() for time in (t, s))
        # All of them, so that an interval that the schedule does not have is refused in the first step.
        planned = [(interval, interval.times(process.schedule, like=t)) for interval in self.intervals]
        for interval, (low, *times) in planned:
            if level_s <= interval.low < level_t:
                x = self.sampler.step(process, x, t, low)
                for _ in range(interval.num_restarts):
                    x = self.restart(process, x, low, torch.stack(times))
                t = low
        return self.sampler.step(process, x, t, s) if t > s else x

    def restart(self, process: Process, x: Tensor, low: Tensor, times: Tensor) -> Tensor:
        """x (B, C, H, W) at the low end from x there, by way of more noise and down again at `times`."""
        schedule = process.schedule
        states = self.sampler.trajectory(
            process.denoise, schedule, renoised(process, x, low, times[0]), times=times, noise=process.noise
        )
        for state in states:
            x = state.x
        return x


def renoised(process: Process, x: Tensor, s: Tensor, t: Tensor, *, std: float = 1.0) -> Tensor:
    """x_t from x_s for t > s: the forward process, with noise of a standard deviation."""
    alpha, sigma = process.schedule.alpha, process.schedule.sigma
    s, t = s.double(), t.double()
    kept = alpha(t) / alpha(s)
    return kept * x + std * (sigma(t) ** 2 - (kept * sigma(s)) ** 2).sqrt() * process.noise()
