"""DPM-Solver++ for the flow: exponential integrators that extrapolate x_0 in lambda = log(alpha / sigma)."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion import Schedule
from ldm.samplers.ancestral import ancestral_step, check_eta, level_between, noise_for, split
from ldm.samplers.base import MAX_RATIO, Process, Sampler


class DPMSolverPP2M(Sampler):
    """Second order from the current and the previous answer, one evaluation a step (Lu et al. 2022, algorithm 2).

    With lambda = log(alpha / sigma) and h = lambda_s - lambda_t, x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) D,
    where D extrapolates x_0 linearly in lambda. The first step, and the last one to t = 0, are of first order.
    The steps must not grow much in lambda: with discretization=linspace set discretization.endpoint=false.
    """

    looks_back = True

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        alpha, sigma = process.schedule.alpha, process.schedule.sigma
        previous = process.history[-1] if process.history else None
        x_0 = process.evaluate(x, t).x_0
        if previous is not None and sigma(s) > 0 and process.lowered(2) == 2:
            slope = (x_0 - previous.prediction.x_0) / (
                log_snr(process.schedule, t) - log_snr(process.schedule, previous.t)
            )
            x_0 = x_0 + slope * (log_snr(process.schedule, s) - log_snr(process.schedule, t)) / 2
        # alpha_s e^-h = alpha_t sigma_s / sigma_t, which is finite also where alpha_t = 0.
        return sigma(s) / sigma(t) * x + (alpha(s) - alpha(t) * sigma(s) / sigma(t)) * x_0


class DPMSolverPP2S(Sampler):
    """Second order from an answer half way in lambda, two evaluations a step (Lu et al. 2022, algorithm 1, r = 1/2).

    diffusers' DPMSolverSinglestepScheduler is the same where every other one of its times lies half way. A step to
    t = 0 is of first order.

    Args:
        eta: 0 is deterministic; 1 goes down further and adds noise, as `sample_dpmpp_2s_ancestral` of k-diffusion.
    """

    evaluations_per_step = 2

    def __init__(self, *, eta: float = 0.0) -> None:
        check_eta(eta)
        self.eta = eta

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x_0 = process.evaluate(x, t).x_0
        down, _ = split(process.schedule, t, s, eta=self.eta)
        if down > 0 and process.schedule.ratio(t) <= MAX_RATIO:
            middle = level_between(process.schedule, t, down)
            x_0 = process.evaluate(first_order(process.schedule, x, x_0, t=t, s=middle), middle).x_0
        z = noise_for(process, x, s, eta=self.eta)
        return ancestral_step(process, x, x_0, t=t, s=s, eta=self.eta, z=z)


def recent_beliefs(process: Process, num: int) -> tuple[list[Tensor], list[Tensor]]:
    """(lambdas, x_0s) of the last num answers, newest first; earlier ones only if they were not all but noise."""
    answers = process.recent(num)
    answers = answers[:1] + [answer for answer in answers[1:] if process.schedule.ratio(answer.t) <= MAX_RATIO]
    return [log_snr(process.schedule, t.double()) for t, _ in answers], [prediction.x_0 for _, prediction in answers]


def first_order(schedule: Schedule, x: Tensor, x_0: Tensor, *, t: Tensor, s: Tensor) -> Tensor:
    """x_s from x_t (B, C, H, W) if x_0 were the same all the way: DDIM."""
    t, s = t.double(), s.double()
    kept = schedule.sigma(s) / schedule.sigma(t)
    return kept * x + (schedule.alpha(s) - kept * schedule.alpha(t)) * x_0


def log_snr(schedule: Schedule, t: Tensor) -> Tensor:
    """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio."""
    return torch.log(schedule.alpha(t) / schedule.sigma(t))
