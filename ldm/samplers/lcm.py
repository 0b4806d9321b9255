"""Sampling from a consistency model in a few steps."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion import Schedule
from ldm.diffusion.schedules import DiscreteSchedule
from ldm.samplers.base import Process, Sampler

SIGMA_DATA = 0.5


class LCM(Sampler):
    """The belief in x_0 is noised anew to the next time (Luo et al. 2023, algorithm 3; diffusers' LCMScheduler).

    The belief is c_skip x_t + c_out x_0 with c_skip = 0.25 / (u^2 + 0.25), c_out = u / sqrt(u^2 + 0.25) and
    u = time_scale * training index, so that it is x_t at t = 0. The last step adds no noise. The draws of noise are
    those of diffusers: one a step but the last. For models distilled to consistency, at `DistilledSteps`.

    Args:
        time_scale: how fast c_skip falls from 1 to 0; 10 as published.
    """

    def __init__(self, *, time_scale: float = 10.0) -> None:
        if time_scale <= 0:
            raise ValueError(f"got sampler.time_scale={time_scale}, expected a positive number")
        self.time_scale = time_scale

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        u = self.time_scale * training_index(process.schedule, t.double())
        c_skip, c_out = SIGMA_DATA**2 / (u**2 + SIGMA_DATA**2), u / (u**2 + SIGMA_DATA**2).sqrt()
        belief = c_skip * x + c_out * process.evaluate(x, t).x_0
        if process.steps_left == 1:
            return belief
        return process.schedule.alpha(s) * belief + process.schedule.sigma(s) * process.noise()


def training_index(schedule: Schedule, t: Tensor) -> Tensor:
    """The training step at time t; thousandths of t_max where the schedule has none."""
    return schedule.network_time(t) if isinstance(schedule, DiscreteSchedule) else 1000 * t / schedule.t_max
