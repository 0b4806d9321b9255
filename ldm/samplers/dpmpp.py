"""DPM-Solver++, multistep."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion import Schedule
from ldm.samplers.base import Process, Sampler


class DPMSolverPP2M(Sampler):
    """Second order from the current and the previous answer, one evaluation a step (Lu et al. 2022, algorithm 2).

    With lambda = log(alpha / sigma) and h = lambda_s - lambda_t, x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) D,
    where D extrapolates x_0 linearly in lambda. The first step, and the last one to t = 0, are of first order.
    """

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        alpha, sigma = process.schedule.alpha, process.schedule.sigma
        previous = process.history[-1] if process.history else None
        x_0 = process.evaluate(x, t).x_0
        if previous is not None and sigma(s) > 0:
            slope = (x_0 - previous.prediction.x_0) / (
                log_snr(process.schedule, t) - log_snr(process.schedule, previous.t)
            )
            x_0 = x_0 + slope * (log_snr(process.schedule, s) - log_snr(process.schedule, t)) / 2
        # alpha_s e^-h = alpha_t sigma_s / sigma_t, which is finite also where alpha_t = 0.
        return sigma(s) / sigma(t) * x + (alpha(s) - alpha(t) * sigma(s) / sigma(t)) * x_0


def log_snr(schedule: Schedule, t: Tensor) -> Tensor:
    """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio."""
    return torch.log(schedule.alpha(t) / schedule.sigma(t))
