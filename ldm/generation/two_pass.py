"""Large pictures from a model of small ones: sampled at its own size, enlarged, and made sharp by sampling again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.nn.functional import interpolate

from ldm.generation.image_to_image import noised_image
from ldm.generation.task import Order, Start, Task, check_strength
from ldm.generation.text_to_image import TextToImage

if TYPE_CHECKING:
    from ldm.generation.pipeline import Pipeline, SamplingSettings


class TwoPass(Task):
    """A model that samples beyond its own size repeats what it draws; from an enlarged picture it does not.

    Args:
        scale: how many times larger, a side.
        strength: share of the sampling steps that the second pass takes.

    Raises:
        ValueError: a scale that does not enlarge, or a strength out of range.
    """

    def __init__(self, *, scale: float = 2.0, strength: float = 0.6) -> None:
        if scale <= 1:
            raise ValueError(f"got scale={scale:g}, expected more than 1; task=text_to_image samples at one size")
        self.scale, self.strength = scale, check_strength(strength)

    def start(self, pipeline: Pipeline, orders: Sequence[Order], settings: SamplingSettings) -> Start:
        pipeline.require_plain()
        unit = pipeline.size_unit
        height, width = (round(side * self.scale / unit) * unit for side in settings.size)
        small = pipeline.draw(orders, task=TextToImage(), settings=settings, batch_size=len(orders))
        large = interpolate(small, size=(height, width), mode="bicubic", antialias=True).clamp(-1, 1)
        return noised_image(pipeline, orders, settings, image=large, strength=self.strength)
