"""What every sampler is: a step from time t to an earlier time s, and a generator that strings steps together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from ldm.diffusion import Denoise, Prediction, Schedule

# How many answers a step may look back at: no multistep method is of higher order, and long runs must not keep all.
MAX_HISTORY = 4

Noise = Callable[[], Tensor]
"""Draws fresh standard normal noise of the shape of x; each sample's from its own generator."""

Constrain = Callable[[Tensor, Tensor], Tensor]
"""constrain(x_s (B, C, H, W), s ()) -> x_s: what a task knows of the result, such as the part outside a mask."""


class Evaluation(NamedTuple):
    """One answer of the model: at time t () it believed `prediction`."""

    t: Tensor
    prediction: Prediction


@dataclass
class Process:
    """One sampling run: the model, its schedule, a source of noise, and what the model has answered last."""

    denoise: Denoise
    schedule: Schedule
    noise: Noise
    history: list[Evaluation] = field(default_factory=list)

    def evaluate(self, x: Tensor, t: Tensor) -> Prediction:
        """Asks the model about x (B, C, H, W) at time t () and remembers the answer."""
        prediction = self.denoise(x, t)
        self.history.append(Evaluation(t, prediction))
        return prediction

    def transfer(self, prediction: Prediction, s: Tensor) -> Tensor:
        """x_s = alpha(s) x_0 + sigma(s) eps: first order in time, exact where the prediction is."""
        return self.schedule.alpha(s) * prediction.x_0 + self.schedule.sigma(s) * prediction.eps


class State(NamedTuple):
    """One point of a trajectory: x_t at time t (), and the prediction that led to it (None at the start)."""

    t: Tensor
    x: Tensor
    prediction: Prediction | None


class Sampler(ABC):
    """Integrates from noise to data.

    Attributes:
        evaluations_per_step: how often a step asks the model, for cost estimates.
    """

    evaluations_per_step: int = 1

    @abstractmethod
    def step(self, process: Process, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x_s from x_t, for times t > s of shape ()."""

    def trajectory(
        self,
        denoise: Denoise,
        schedule: Schedule,
        x: Tensor,
        *,
        times: Tensor,
        noise: Noise,
        constrain: Constrain | None = None,
    ) -> Iterator[State]:
        """Yields the start and every step's state; times (num_steps + 1,) fall from the noise of x.

        Args:
            constrain: corrects the state after every step.
        """
        process = Process(denoise, schedule, noise)
        yield State(times[0], x, None)
        for t, s in pairwise(times):
            del process.history[:-MAX_HISTORY]
            num_answers = len(process.history)
            x = self.step(process, x, t, s)
            x = x if constrain is None else constrain(x, s)
            yield State(s, x, process.history[num_answers].prediction)

    def __call__(self, denoise: Denoise, schedule: Schedule, x: Tensor, *, times: Tensor, noise: Noise) -> Tensor:
        """x_0 (B, C, H, W) from noise x: the end of the trajectory."""
        for state in self.trajectory(denoise, schedule, x, times=times, noise=noise):
            x = state.x
        return x
