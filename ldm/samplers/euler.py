"""Euler's method, and its ancestral form."""

from __future__ import annotations

from torch import Tensor

from ldm.samplers.base import Process, Sampler
from ldm.samplers.ddim import DDIM


class Euler(Sampler):
    """One straight step along the current prediction.

    On d(x / alpha) / d(sigma / alpha) = eps this is DDIM with eta = 0; on rectified flow it is Euler in t.
    """

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return process.transfer(process.evaluate(x, t), s)


class EulerAncestral(DDIM):
    """Euler down to less noise than s has, and fresh noise for the rest (k-diffusion, `euler_ancestral`).

    In x / alpha over sigma / alpha this is DDIM word for word, whose eta = 1 it makes the default. The draws of noise
    are those of diffusers' EulerAncestralDiscreteScheduler: one a step, in order.
    """

    def __init__(self, *, eta: float = 1.0) -> None:
        super().__init__(eta=eta)
