"""Euler's method on the reverse stochastic differential equation."""

from __future__ import annotations

from torch import Tensor

from ldm.samplers.base import Process, Sampler


class EulerMaruyama(Sampler):
    """x_s = x_t - (t - s) (v + w eps / sigma) + sqrt(2 w (t - s)) z, with v = dx_t/dt and w = noise sigma(t).

    For every w >= 0 the exact equation carries the distribution of x_t to that of x_s; noise = 0 is the flow.
    Source: Ma et al. 2024 (SiT), section 2.4, whose diffusion coefficient "sigma" is noise = 1.

    Args:
        noise: how much of it, 0 or more.
    """

    def __init__(self, *, noise: float = 1.0) -> None:
        if noise < 0:
            raise ValueError(f"got sampler.noise={noise}, expected 0 (the flow) or more")
        self.noise = noise

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x_0, eps = process.evaluate(x, t)
        schedule = process.schedule
        if schedule.sigma(s) == 0:
            return process.transfer(process.history[-1].prediction, s)
        velocity = schedule.alpha_dot(t) * x_0 + schedule.sigma_dot(t) * eps
        mean = x - (t - s) * (velocity + self.noise * eps)
        return mean + (2 * self.noise * schedule.sigma(t) * (t - s)).sqrt() * process.noise()
