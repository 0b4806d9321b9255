"""Heun's method, second order."""

from __future__ import annotations

from torch import Tensor

from ldm.samplers.base import MAX_RATIO, Process, Sampler


class Heun(Sampler):
    """An Euler step, then the mean of the slopes at both ends (Karras et al. 2022, algorithm 1).

    It integrates in the schedule's own coordinates: x / alpha over sigma / alpha, or x over t on rectified flow.
    The last step, to t = 0, is Euler's.
    """

    evaluations_per_step = 2

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        schedule = process.schedule
        prediction = process.evaluate(x, t)
        x_s = process.transfer(prediction, s)
        scale_t, tau_t = schedule.coordinates(t)
        if schedule.sigma(s) == 0 or tau_t > MAX_RATIO:
            return x_s
        scale_s, tau_s = schedule.coordinates(s)
        tangents = schedule.tangent(*prediction), schedule.tangent(*process.evaluate(x_s, s))
        return scale_s * (x / scale_t + (tau_s - tau_t) * (tangents[0] + tangents[1]) / 2)
