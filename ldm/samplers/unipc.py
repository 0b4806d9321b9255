"""UniPC: a multistep predictor whose state the next answer corrects, at no evaluation of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ldm.samplers.base import Process, Sampler
from ldm.samplers.dpmpp import first_order, log_snr, recent_beliefs
from ldm.samplers.linear_multistep import quadrature


class UniPC(Sampler):
    """Multistep UniPC on x_0 (Zhao et al. 2023, algorithms 5 to 8; diffusers' UniPCMultistepScheduler).

    A step first corrects x_t by the answer at x_t, then predicts x_s. Both share all but their residuals, weighted
    differences of answers, so that the correction is a difference of residuals and needs no earlier state. The last
    step is of first, the last but one at most of second order.

    Args:
        order: of the predictor; the corrector is one order higher.
        variant: the function B(h) of the paper; in x_0 and lambda "bh1" is h, "bh2" is 1 - e^-h.
    """

    looks_back = True

    def __init__(self, *, order: int = 2, variant: Literal["bh1", "bh2"] = "bh2") -> None:
        if not 1 <= order <= 3:
            raise ValueError(f"got sampler.order={order}, expected a number from 1 to 3")
        if variant not in ("bh1", "bh2"):
            raise ValueError(f"got sampler.variant={variant}, expected bh1 or bh2")
        self.order, self.variant = order, variant

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        process.evaluate(x, t)
        lambdas, beliefs = recent_beliefs(process, self.order + 1)
        if len(beliefs) > 1:
            order = min(self.order, process.steps_left + 1, len(beliefs) - 1)
            levels = [level.item() for level in lambdas]
            # From the step before: what the corrector would have added, less what the predictor did.
            gained = self.residual(levels[1 : order + 1], levels[0], beliefs[1 : order + 1], beliefs[0])
            gained = gained - self.residual(levels[1 : order + 1], levels[0], beliefs[1 : order + 1])
            x = x + process.schedule.alpha(t.double()) * gained
        order = min(self.order, process.steps_left, len(beliefs))
        x_s = first_order(process.schedule, x, beliefs[0], t=t, s=s)
        if order == 1 or process.schedule.sigma(s) == 0:
            return x_s
        *levels, end = (level.item() for level in (*lambdas[:order], log_snr(process.schedule, s.double())))
        return x_s + process.schedule.alpha(s.double()) * self.residual(levels, end, beliefs[:order])

    def residual(
        self, lambdas: Sequence[float], end: float, beliefs: Sequence[Tensor], answer: Tensor | None = None
    ) -> Tensor:
        """What a step to `end` adds to a first-order one, as a share of alpha_s.

        Args:
            lambdas, beliefs: of the answers that the predictor knew, newest first.
            answer: x_0 at `end`; with it, the corrector.
        """
        h = end - lambdas[0]
        nodes = [(level - lambdas[0]) / h for level in lambdas[1:]]
        values = [(belief - beliefs[0]) / node for belief, node in zip(beliefs[1:], nodes, strict=True)]
        if answer is not None:
            nodes, values = [*nodes, 1.0], [*values, answer - beliefs[0]]
        weighted = zip(self.shares(nodes, h), values, strict=True)
        return sum((share * value for share, value in weighted), torch.zeros_like(beliefs[0]))

    def shares(self, nodes: Sequence[float], h: float) -> list[float]:
        """The weights of the differences at nodes; B(h) matters only where one difference stands alone."""
        if len(nodes) == 1:
            return [h / 2 if self.variant == "bh1" else -math.expm1(-h) / 2]
        moments = [-math.expm1(-h)]
        for k in range(1, len(nodes) + 1):
            moments.append(1 - k / h * moments[-1])
        return quadrature(nodes, moments[1:]) if nodes else []
