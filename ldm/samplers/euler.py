"""Euler's method."""

from __future__ import annotations

from torch import Tensor

from ldm.samplers.base import Process, Sampler


class Euler(Sampler):
    """One straight step along the current prediction.

    On d(x / alpha) / d(sigma / alpha) = eps this is DDIM with eta = 0; on rectified flow it is Euler in t.
    """

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return process.transfer(process.evaluate(x, t), s)
