"""From one picture to the next: the frames between seeds, or prompts, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from ldm.generation.task import Order
from ldm.generation.text_to_image import TextToImage


class Interpolate(TextToImage):
    """Frames on the way through several seeds and prompts: noise on the great circle, conditions on the straight line.

    Args:
        to: a prompt that ends the way which starts with the others.
        num_frames: from one key picture to the next, the next counted.
        frames_per_second: of the animation.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, *, to: str | None = None, num_frames: int = 10, frames_per_second: float = 8.0) -> None:
        if num_frames < 1 or frames_per_second <= 0:
            raise ValueError(
                f"got num_frames={num_frames}, frames_per_second={frames_per_second:g}, expected positive numbers"
            )
        self.to, self.num_frames, self.frames_per_second = to, num_frames, frames_per_second

    def orders(self, prompts: Sequence[str], seeds: Sequence[int], *, negative_prompt: str = "") -> list[Order]:
        """The frames: key pictures are prompt i with seed i, where one prompt or one seed serves all.

        Raises:
            ValueError: there are no two key pictures, or prompts and seeds differ in number.
        """
        prompts = [*prompts, self.to] if self.to is not None else list(prompts)
        num_keys = max(len(prompts), len(seeds))
        if num_keys < 2 or len(prompts) not in (1, num_keys) or len(seeds) not in (1, num_keys):
            raise ValueError(
                f"got {len(prompts)} prompts and {len(seeds)} seeds to go through, expected at least two of one, "
                "and one or as many of the other; set seeds=[0,1] or to=PROMPT"
            )
        # A context that grew on the way from one key picture to the next would make the animation jump.
        all_prompts = tuple(dict.fromkeys(prompts)) if len(set(prompts)) > 1 else None
        prompts, seeds = prompts * (num_keys // len(prompts)), list(seeds) * (num_keys // len(seeds))
        keys = list(zip(prompts, seeds, strict=True))
        frames = [
            _between(start, end, frame / self.num_frames)
            for start, end in pairwise(keys)
            for frame in range(self.num_frames)
        ]
        return [
            replace(frame, negative_prompt=negative_prompt, all_prompts=all_prompts)
            for frame in (*frames, Order(*keys[-1]))
        ]


def _between(start: tuple[str, int], end: tuple[str, int], amount: float) -> Order:
    if amount == 0 or start == end:
        return Order(*start)
    other_prompt = None if start[0] == end[0] else end[0]
    other_seed = None if start[1] == end[1] else end[1]
    return Order(*start, other_prompt=other_prompt, other_seed=other_seed, amount=amount)
