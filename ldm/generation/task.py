"""What a task is: which pictures are asked for, and where the sampling of each of them begins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ldm.diffusion import Conditioning
from ldm.samplers.base import Constrain, Noise

if TYPE_CHECKING:
    from ldm.generation.pipeline import Pipeline, SamplingSettings


@dataclass(frozen=True)
class Order:
    """One picture to make: a prompt and a seed, or a point on the way from these to another prompt and seed.

    Args:
        negative_prompt: what guidance leads away from; "" is the null condition.
        other_prompt, other_seed: the end of the way; None stays with the own.
        amount: how far on the way, 0 to 1.
        all_prompts: of the animation that this is a frame of; each frame's context is as long as the longest of theirs.
    """

    prompt: str
    seed: int
    negative_prompt: str = ""
    other_prompt: str | None = None
    other_seed: int | None = None
    amount: float = 0.0
    all_prompts: tuple[str, ...] | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """All that decides how long the context is."""
        other = () if self.other_prompt is None else (self.other_prompt,)
        return (self.prompt, *other, self.negative_prompt, *(self.all_prompts or ()))


@dataclass(frozen=True)
class Start:
    """Where the sampling of B pictures begins.

    Args:
        x: (B, C, h, w), noisy latents at times[0].
        times: (num_steps + 1,), falling.
        cond, uncond: what the pictures are to show, and what guidance leads away from.
        noise: what stochastic samplers draw from.
        constrain: corrects the state after every step.
    """

    x: Tensor
    times: Tensor
    cond: Conditioning
    uncond: Conditioning
    noise: Noise
    constrain: Constrain | None = None


class Task(ABC):
    """A way to make pictures with a model.

    Attributes:
        frames_per_second: of the animation that the pictures are the frames of; None where they are none.
    """

    frames_per_second: float | None = None

    def orders(self, prompts: Sequence[str], seeds: Sequence[int], *, negative_prompt: str = "") -> list[Order]:
        """The pictures that prompts and seeds ask for: here every prompt with every seed."""
        return [Order(prompt, seed, negative_prompt) for prompt in prompts for seed in seeds]

    @abstractmethod
    def start(self, pipeline: Pipeline, orders: Sequence[Order], settings: SamplingSettings) -> Start:
        """Where the sampling of these pictures begins.

        Raises:
            ValueError: the model cannot do this task.
        """

    def finish(self, images: Tensor) -> Tensor:
        """The pictures (B, 3, H, W) in [-1, 1], given what was decoded."""
        return images


def strength_times(times: Tensor, strength: float) -> Tensor:
    """The last floor(strength * num_steps) steps of times (num_steps + 1,): the noisier ones are left out.

    Raises:
        ValueError: no step is left.
    """
    num_steps = len(times) - 1
    kept = int(num_steps * strength)
    if kept < 1:
        raise ValueError(
            f"got strength={strength:g} of {num_steps} steps, which leaves none; expected at least one; "
            "raise strength or steps"
        )
    return times[num_steps - kept :]


def check_strength(strength: float) -> float:
    """The strength itself.

    Raises:
        ValueError: it is not above 0 and at most 1.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"got strength={strength:g}, expected above 0 (keep the image) and at most 1 (ignore it)")
    return strength
