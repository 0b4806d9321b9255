"""DPM-Solver-2 in the noise levels of Karras et al."""

from __future__ import annotations

from torch import Tensor

from ldm.samplers.ancestral import check_eta, level_between, noise_for, split
from ldm.samplers.base import MAX_RATIO, Process, Sampler


class KDPM2(Sampler):
    """The slope half way in log(sigma / alpha) carries the whole step, two evaluations (k-diffusion, `dpm_2`).

    Equal to diffusers' KDPM2DiscreteScheduler (eta = 0) and KDPM2AncestralDiscreteScheduler (eta = 1), with the same
    draws of noise: one a step. A step to t = 0 is Euler's.

    Args:
        eta: 0 is deterministic; 1 goes down further and adds noise.
    """

    evaluations_per_step = 2

    def __init__(self, *, eta: float = 0.0) -> None:
        check_eta(eta)
        self.eta = eta

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        schedule, prediction = process.schedule, process.evaluate(x, t)
        down, up = split(schedule, t, s, eta=self.eta)
        alpha, level = schedule.alpha(s.double()), schedule.ratio(t.double())
        noise = alpha * up * noise_for(process, x, s, eta=self.eta)
        if down == 0 or level > MAX_RATIO:
            return alpha * (prediction.x_0 + down * prediction.eps) + noise
        middle = level_between(schedule, t, down)
        eps = process.evaluate(process.transfer(prediction, middle), middle).eps
        return alpha * (x / schedule.alpha(t.double()) + (down - level) * eps) + noise
