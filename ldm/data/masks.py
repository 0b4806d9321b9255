"""Masks for training to inpaint, drawn anew for every sample and epoch."""

from collections.abc import Mapping, Sequence
from math import cos, pi, sin
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ldm.data.draws import Draws
from ldm.data.geometry import Geometry

KINDS = ("strokes", "boxes", "lama")
# Pixels of the pictures for which the sizes below are stated; other pictures have them in proportion.
REFERENCE_SIZE = 256
MAX_TRIES = 8


class RandomMask:
    """Makes `mask` (1, H, W), 1 where the picture is to be made anew: what an inpainting model is trained with.

    `strokes` are chains of lines with round ends, `boxes` are rectangles, and `lama` is one or the other, evenly, as
    Suvorov et al. 2022 (appendix) draw large masks; latent diffusion's inpainting models were trained with theirs.

    Args:
        kind: strokes, boxes or lama.
        whole: share of the samples of which everything is masked, so that the model can also make pictures.
        strokes: at most so many chains; each of up to `vertices` lines.
        stroke_length, stroke_width: at most, in pixels of a picture of 256.
        boxes: at most so many rectangles; `box_size` is (least, most) of their sides in pixels of a picture of 256.
        margin: that rectangles keep from the border, likewise.
        max_share: of the picture that a mask may cover; a larger one is drawn again, up to eight times.

    Raises:
        ValueError: a word or number out of range.
    """

    columns: Sequence[str] = ()

    def __init__(
        self,
        kind: str = "lama",
        *,
        whole: float = 0.0,
        strokes: int = 5,
        vertices: int = 8,
        stroke_length: int = 200,
        stroke_width: int = 100,
        boxes: int = 4,
        box_size: tuple[int, int] = (30, 150),
        margin: int = 10,
        max_share: float = 0.9,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"derive.kind: got {kind!r}, expected one of {list(KINDS)}")
        if not 0 <= whole <= 1 or not 0 < max_share <= 1:
            raise ValueError(f"derive: got whole={whole} and max_share={max_share}, expected shares from 0 to 1")
        numbers = (strokes, vertices, stroke_length, stroke_width, boxes, *box_size)
        if min(numbers) < 1 or box_size[0] > box_size[1] or margin < 0 or 2 * margin >= REFERENCE_SIZE:
            raise ValueError(f"derive: got {numbers} and margin={margin}, expected counts and sizes of at least 1")
        self.kind, self.whole, self.max_share = kind, whole, max_share
        self.strokes, self.vertices = strokes, vertices
        self.stroke_length, self.stroke_width = stroke_length, stroke_width
        self.boxes, self.box_size, self.margin = boxes, (box_size[0], box_size[1]), margin

    def __call__(
        self, pixels: np.ndarray, *, row: Mapping[str, Any], geometry: Geometry, draws: Draws
    ) -> dict[str, np.ndarray]:
        """Return `mask`, uint8 (1, H, W) of 0 and 1, with at least one pixel of 1."""
        height, width = pixels.shape[:2]
        if draws.uniform() < self.whole:
            return {"mask": np.ones((1, height, width), dtype=np.uint8)}
        for _ in range(MAX_TRIES):
            mask = self._drawn(width, height, draws)
            if 0 < mask.mean() <= self.max_share:
                break
        else:  # a box in the middle is within any share that is left
            mask = np.zeros((height, width), dtype=np.uint8)
            half = [max(1, int(side * self.max_share**0.5 / 2)) for side in (height, width)]
            mask[height // 2 - half[0] : height // 2 + half[0], width // 2 - half[1] : width // 2 + half[1]] = 1
        return {"mask": mask[None]}

    def _drawn(self, width: int, height: int, draws: Draws) -> np.ndarray:
        image = Image.new("L", (width, height))
        pen, scale = ImageDraw.Draw(image), min(width, height) / REFERENCE_SIZE
        kind = self.kind if self.kind != "lama" else KINDS[draws.integer(0, 1)]
        if kind == "strokes":
            for _ in range(draws.integer(1, self.strokes)):
                self._stroke(pen, (width, height), scale, draws)
        else:
            for _ in range(draws.integer(1, self.boxes)):
                self._box(pen, (width, height), scale, draws)
        return np.array(image, dtype=np.uint8)

    def _stroke(self, pen: ImageDraw.ImageDraw, size: tuple[int, int], scale: float, draws: Draws) -> None:
        """Draw a chain of lines; every other one turns back, so that strokes stay together (LaMa's irregular masks)."""
        x, y = draws.uniform(0, size[0]), draws.uniform(0, size[1])
        thickness = max(1.0, (10 + draws.uniform(0, self.stroke_width)) * scale)
        for i in range(1 + draws.integer(1, self.vertices)):
            angle = draws.uniform(0.0, 4.0) if i % 2 else 2 * pi - draws.uniform(0.0, 4.0)
            length = (10 + draws.uniform(0, self.stroke_length)) * scale
            end_x = min(max(x + length * sin(angle), 0.0), float(size[0]))
            end_y = min(max(y + length * cos(angle), 0.0), float(size[1]))
            pen.line([x, y, end_x, end_y], fill=1, width=round(thickness))
            for at_x, at_y in ((x, y), (end_x, end_y)):
                half = thickness / 2
                pen.ellipse([at_x - half, at_y - half, at_x + half, at_y + half], fill=1)
            x, y = end_x, end_y

    def _box(self, pen: ImageDraw.ImageDraw, size: tuple[int, int], scale: float, draws: Draws) -> None:
        corner, sides = [], []
        for side in size:
            margin = min(self.margin * scale, (side - 1) / 2)
            extent = draws.uniform(self.box_size[0] * scale, self.box_size[1] * scale)
            extent = max(1.0, min(extent, side - 2 * margin))
            corner.append(draws.uniform(margin, max(margin, side - margin - extent)))
            sides.append(extent)
        (left, top), (wide, high) = corner, sides
        pen.rectangle([left, top, left + wide - 1, top + high - 1], fill=1)
