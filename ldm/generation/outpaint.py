"""A picture made larger around its edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ldm.generation.image_to_image import read_image
from ldm.generation.inpaint import Repaint
from ldm.generation.pictures import Source
from ldm.generation.task import Order, Start

if TYPE_CHECKING:
    from ldm.generation.pipeline import Pipeline, SamplingSettings


class Outpaint(Repaint):
    """Adds pixels at the sides of an image, and fades from the old into the new.

    Args:
        image: a picture or its file.
        left, right, top, bottom: pixels to add.
        feather: pixels of the image, at each side that grows, across which old fades into new; None is an eighth of
            its shorter side.
        image_size: one number or [height, width] that the image is scaled and cut to first; None keeps its own size.

    Raises:
        ValueError: a file that cannot be read, nothing to add, or more to fade across than there is.
    """

    def __init__(
        self,
        image: Source,
        *,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        feather: int | None = None,
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        sides = (left, right, top, bottom)
        given = f"left={left}, right={right}, top={top}, bottom={bottom}"
        if min(sides) < 0:
            raise ValueError(f"got a negative number in {given}, expected pixels to add; nothing is cut off here")
        if not any(sides):
            raise ValueError(f"got {given}, expected pixels to add at one side at least")
        old, size = read_image(image, image_size)
        feather = min(size) // 8 if feather is None else feather
        if not 0 <= feather <= min(size):
            raise ValueError(f"got feather={feather}, expected 0 to {min(size)}, the image's shorter side")
        mask = faded(size, sides, feather)
        super().__init__(pad(old, sides, mode="replicate"), mask=mask, strength=1.0, keep_pixels=True)

    def start(self, pipeline: Pipeline, orders: Sequence[Order], settings: SamplingSettings) -> Start:
        unit = pipeline.size_unit
        height, width = self.image.shape[-2:]
        if height % unit or width % unit:
            raise ValueError(
                f"got {width}x{height} pixels with those added, expected multiples of {unit}; add {-width % unit} more "
                f"at left or right and {-height % unit} more at top or bottom"
            )
        return super().start(pipeline, orders, settings)


def faded(size: tuple[int, int], sides: tuple[int, int, int, int], feather: int) -> Tensor:
    """The mask (1, 1, H, W) of an image (height, width) that grows at (left, right, top, bottom).

    1 in what is new; in the old it falls to 0 across `feather` pixels, from each side that grows.
    """
    height, width = size
    left, right, top, bottom = sides
    columns = torch.maximum(_ramp(width, left, feather), _ramp(width, right, feather).flip(0))
    rows = torch.maximum(_ramp(height, top, feather), _ramp(height, bottom, feather).flip(0))
    inside = torch.maximum(rows[:, None], columns[None, :])
    return pad(inside[None, None], sides, value=1.0)


def _ramp(length: int, added: int, feather: int) -> Tensor:
    """(length,) falling from 1 to 0 over the first `feather` values, or zeros where nothing is added."""
    if not added or not feather:
        return torch.zeros(length)
    return (1 - (torch.arange(length) + 0.5) / feather).clamp_min(0)
