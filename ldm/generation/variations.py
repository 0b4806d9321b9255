"""Pictures near a picture: the noise of one seed, moved some way towards that of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ldm.generation.image_to_image import noised_image, read_image
from ldm.generation.pictures import Source
from ldm.generation.task import Order, Start, Task, check_strength
from ldm.generation.text_to_image import TextToImage

if TYPE_CHECKING:
    from ldm.generation.pipeline import Pipeline, SamplingSettings


class Variations(Task):
    """The picture of a prompt and the first seed, and others that differ from it by some of each further seed's noise.

    With an image, its variations: what image_to_image makes of it with the noise of each seed.

    Args:
        amount: how far from the first seed's noise to another's, 0 to 1.
        image: a picture or its file.
        strength: of image_to_image; with an image alone.
        image_size: one number or [height, width] that the image is scaled and cut to; None keeps its own size.

    Raises:
        ValueError: an amount or strength out of range, a strength without an image, a file that cannot be read.
    """

    def __init__(
        self,
        *,
        amount: float = 0.3,
        image: Source | None = None,
        strength: float | None = None,
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        if not 0 < amount <= 1:
            raise ValueError(
                f"got amount={amount:g}, expected above 0 and at most 1, where nothing of the seed is left"
            )
        if image is None and strength is not None:
            raise ValueError("got strength without an image, expected both or neither; give image=FILE")
        self.amount = amount
        self.strength = check_strength(0.6 if strength is None else strength)
        self.image = None if image is None else read_image(image, image_size)[0]

    def orders(self, prompts: Sequence[str], seeds: Sequence[int], *, negative_prompt: str = "") -> list[Order]:
        """For every prompt the first seed's own picture, and its variation by each of the others.

        Raises:
            ValueError: there is no other seed.
        """
        first, *others = seeds
        if not others:
            raise ValueError("got one seed, expected another for each variation; set num_images=5, or seeds=[0,1,2]")
        ways = [(None, 0.0), *((seed, self.amount) for seed in others)]
        return [
            Order(prompt, first, negative_prompt, other_seed=other, amount=amount)
            for prompt in prompts
            for other, amount in ways
        ]

    def start(self, pipeline: Pipeline, orders: Sequence[Order], settings: SamplingSettings) -> Start:
        if self.image is None:
            return TextToImage().start(pipeline, orders, settings)
        pipeline.require_plain()
        return noised_image(pipeline, orders, settings, image=self.image, strength=self.strength)
