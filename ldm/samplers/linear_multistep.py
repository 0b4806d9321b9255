"""Multistep methods on tangents: x / m moves over tau by a weighted sum of the last tangents.

(m, tau) are the schedule's `coordinates`: x / alpha over sigma / alpha, where the tangent is eps, or x over t on
rectified flow. What differs is how the weights come about: see `PLMS`, `LMS`, `DEIS`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from ldm.diffusion import Prediction
from ldm.samplers.base import MAX_RATIO, Process, Sampler


class LinearMultistep(Sampler):
    """x_s / m_s = x_t / m_t + sum of weight * tangent over the last `order` answers, fewer at the start.

    Args:
        order: how many answers count.
    """

    looks_back = True
    highest_order = 4

    def __init__(self, *, order: int) -> None:
        if not 1 <= order <= self.highest_order:
            raise ValueError(f"got sampler.order={order}, expected a number from 1 to {self.highest_order}")
        self.order = order

    @abstractmethod
    def weights(self, taus: Sequence[float], tau_s: float) -> list[float]:
        """The weights of the tangents at taus, newest first; they sum to tau_s - taus[0]."""

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        prediction = process.evaluate(x, t)
        taus, tangents = known(process, self.order_of(process, s))
        if not taus:
            return process.transfer(prediction, s)
        return move(process, x, t=t, s=s, tangents=tangents, weights=self.weights(taus, tau_of(process, s)))

    def order_of(self, process: Process, s: Tensor) -> int:
        """How many answers count in this step."""
        return self.order


class LMS(LinearMultistep):
    """Adams-Bashforth for steps of any length: polynomials in tau through the tangents (as in k-diffusion)."""

    def __init__(self, *, order: int = 4) -> None:
        super().__init__(order=order)

    def weights(self, taus: Sequence[float], tau_s: float) -> list[float]:
        step = tau_s - taus[0]
        nodes = [(tau - taus[0]) / step for tau in taus]
        return [step * weight for weight in quadrature(nodes, [1 / (k + 1) for k in range(len(taus))])]


class DEIS(LinearMultistep):
    """Polynomials in log tau through the tangents (Zhang & Chen 2023, rho-AB with log rho).

    The step to t = 0 is of first order. In fewer than 15 steps the last is of first and the last but one of second
    order, as in diffusers.
    """

    highest_order = 3

    def __init__(self, *, order: int = 3) -> None:
        super().__init__(order=order)

    def order_of(self, process: Process, s: Tensor) -> int:
        return 1 if tau_of(process, s) == 0 else process.lowered(self.order)

    def weights(self, taus: Sequence[float], tau_s: float) -> list[float]:
        if len(taus) == 1:
            return [tau_s - taus[0]]
        # Integrals of (log(tau / taus[0]) / width)^k over tau, by parts.
        width = math.log(tau_s / taus[0])
        moments = [math.expm1(width)]
        for k in range(1, len(taus)):
            moments.append(math.exp(width) - k / width * moments[-1])
        nodes = [math.log(tau / taus[0]) / width for tau in taus]
        return [taus[0] * weight for weight in quadrature(nodes, moments)]


class PLMS(LinearMultistep):
    """Adams-Bashforth weights of even steps, whatever the steps are (Liu et al. 2022; CompVis's PLMSSampler).

    The first step asks twice: its tangent is the mean of those at both ends. Step by step equal to CompVis's code and,
    for a network that predicts eps, to diffusers' PNDMScheduler(skip_prk_steps=True), which for v-prediction averages
    v instead of eps.
    """

    def __init__(self) -> None:
        super().__init__(order=4)

    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if known(process, self.order)[0]:
            return super().step(process, x, t, s)
        prediction = process.evaluate(x, t)
        if tau_of(process, t) > MAX_RATIO:
            return process.transfer(prediction, s)
        # CompVis asks at the next time that is visited, which after the last one is the last one.
        ahead = process.evaluate(process.transfer(prediction, s), s if process.steps_left > 1 else t)
        tangents = [process.schedule.tangent(*answer) for answer in (prediction, ahead)]
        half = (tau_of(process, s) - tau_of(process, t)) / 2
        return move(process, x, t=t, s=s, tangents=tangents, weights=[half, half])

    def weights(self, taus: Sequence[float], tau_s: float) -> list[float]:
        shares = {
            1: (1.0,),
            2: (3 / 2, -1 / 2),
            3: (23 / 12, -16 / 12, 5 / 12),
            4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
        }
        return [(tau_s - taus[0]) * share for share in shares[len(taus)]]


def known(process: Process, num: int) -> tuple[list[float], list[Tensor]]:
    """(taus, tangents) of the last num answers, newest first, up to the first one that was all but noise."""
    answers = [(tau_of(process, t), prediction) for t, prediction in process.recent(num)]
    usable: list[tuple[float, Prediction]] = list(takewhile(lambda answer: answer[0] <= MAX_RATIO, answers))
    return [tau for tau, _ in usable], [process.schedule.tangent(*prediction) for _, prediction in usable]


def move(
    process: Process, x: Tensor, *, t: Tensor, s: Tensor, tangents: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """x_s = m_s (x_t / m_t + sum of weight * tangent)."""
    scale_t, scale_s = (process.schedule.coordinates(time.double())[0] for time in (t, s))
    return scale_s * (x / scale_t + sum(weight * tangent for weight, tangent in zip(weights, tangents, strict=True)))


def tau_of(process: Process, t: Tensor) -> float:
    """The schedule's own coordinate tau at time t ()."""
    return process.schedule.coordinates(t.double())[1].item()


def quadrature(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """The weights w with sum w node^k = moment k for k = 0, 1, ...: exact for polynomials of that degree."""
    powers = torch.tensor([[node**k for node in nodes] for k in range(len(nodes))], dtype=torch.float64)
    return torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist()
