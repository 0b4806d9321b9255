"""Euler's method on the reverse stochastic differential equation."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ldm.samplers.base import Process, Sampler


class EulerMaruyama(Sampler):
    """x_s = x_t - (t - s) (v + w eps / sigma) + sqrt(2 w (t - s)) z, with v = dx_t/dt and w = noise sigma(t).

    For every w >= 0 the exact equation carries the distribution of x_t to that of x_s; noise = 0 is the flow.

    Args:
        noise: how much of it, 0 or more. 1 is the diffusion form "sigma" of SiT's released code; its paper writes 2 w
            for our w (eq. 4), so that w_t = sigma_t there is 0.5 here.
        last: what the step that ends in the data gives: the x_0 that is believed in, or the "mean" of the step, which
            has noise times sigma eps less of the noise (SiT, algorithm 2).

    Raises:
        ValueError: noise below 0, or another word.

    Source: Ma et al. 2024 (SiT), section 2.4.
    """

    def __init__(self, *, noise: float = 1.0, last: Literal["x_0", "mean"] = "x_0") -> None:
        if noise < 0:
            raise ValueError(f"got sampler.noise={noise}, expected 0 (the flow) or more")
        if last not in ("x_0", "mean"):
            raise ValueError(f"got sampler.last={last}, expected x_0 or mean")
        self.noise, self.last = noise, last

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x_0, eps = process.evaluate(x, t)
        schedule = process.schedule
        ends = bool(schedule.sigma(s) == 0)
        if ends and self.last == "x_0":
            return process.transfer(process.history[-1].prediction, s)
        velocity = schedule.alpha_dot(t) * x_0 + schedule.sigma_dot(t) * eps
        mean = x - (t - s) * (velocity + self.noise * eps)
        if ends:
            return mean
        return mean + (2 * self.noise * schedule.sigma(t) * (t - s)).sqrt() * process.noise()
