"""DDIM and its stochastic family, from the deterministic path (eta = 0) to DDPM (eta = 1)."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.variance import posterior_variance
from ldm.samplers.base import Process, Sampler


class DDIM(Sampler):
    """x_s = alpha_s x_0 + sqrt(sigma_s^2 - v) eps + sqrt(v) z (Song et al. 2021, eq. 12).

    v = eta^2 sigma_s^2 (1 - (alpha_t sigma_s / alpha_s sigma_t)^2) is eta^2 times the variance of q(x_s | x_t, x_0),
    so that eta = 1 is DDPM's ancestral sampling; the formula holds for every schedule.
    """

    def __init__(self, *, eta: float = 0.0) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"got sampler.eta={eta}, expected a number from 0 (deterministic) to 1 (DDPM)")
        self.eta = eta

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x_0, eps = prediction = process.evaluate(x, t)
        if self.eta == 0:
            return process.transfer(prediction, s)
        variance = self.eta**2 * posterior_variance(process.schedule, t, s)
        sigma = process.schedule.sigma(s)
        direction = (sigma**2 - variance).clamp_min(0).sqrt()
        return process.schedule.alpha(s) * x_0 + direction * eps + variance.sqrt() * process.noise()
