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

# Beyond this noise level x / alpha has lost the digits that higher orders need (zero terminal SNR): first order there.
MAX_RATIO = 1e4

# In fewer steps than this, high orders are unstable near the data.
MIN_STEPS_OF_FULL_ORDER = 15

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
    """One sampling run: the model, its schedule, a source of noise, and what the model has answered last.

    Attributes:
        num_steps: the steps of the run.
        steps_left: those still to do, the present one included.
    """

    denoise: Denoise
    schedule: Schedule
    noise: Noise
    num_steps: int
    steps_left: int
    history: list[Evaluation] = field(default_factory=list)

    def evaluate(self, x: Tensor, t: Tensor) -> Prediction:
        """Asks the model about x (B, C, H, W) at time t () and remembers the answer."""
        prediction = self.denoise(x, t)
        self.history.append(Evaluation(t, prediction))
        return prediction

    def recent(self, num: int) -> list[Evaluation]:
        """The last answers, newest first, at most num of them and one a time: the last that was given there."""
        found: list[Evaluation] = []
        for answer in reversed(self.history):
            if not found or answer.t != found[-1].t:
                found.append(answer)
        return found[:num]

    def lowered(self, order: int) -> int:
        """The order that a run of few steps can take: in the last step 1, in the last but one 2 (as in diffusers)."""
        return min(order, self.steps_left) if self.num_steps < MIN_STEPS_OF_FULL_ORDER else order

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
        looks_back: whether a step reads the answers of earlier steps, and so needs them to lie on one path.
    """

    evaluations_per_step: int = 1
    looks_back: bool = False

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
        process = Process(denoise, schedule, noise, num_steps=len(times) - 1, steps_left=len(times) - 1)
        yield State(times[0], x, None)
        for t, s in pairwise(times):
            del process.history[:-MAX_HISTORY]
            num_answers = len(process.history)
            x = self.step(process, x, t, s)
            x = x if constrain is None else constrain(x, s)
            yield State(s, x, process.history[num_answers].prediction)
            process.steps_left -= 1

    def __call__(self, denoise: Denoise, schedule: Schedule, x: Tensor, *, times: Tensor, noise: Noise) -> Tensor:
        """x_0 (B, C, H, W) from noise x: the end of the trajectory."""
        for state in self.trajectory(denoise, schedule, x, times=times, noise=noise):
            x = state.x
        return x
