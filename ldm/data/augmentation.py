"""What may happen to a training picture: how it is cut, turned, mirrored and coloured, each a function of the draw."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, radians, sin

import numpy as np
from PIL import Image, ImageEnhance

from ldm.data.attention import offset_of_interest
from ldm.data.draws import Draws
from ldm.data.geometry import Geometry

CROPS = ("centre", "random", "saliency", "entropy")
COLOUR_SPACES = ("rgb", "lab")


@dataclass(frozen=True)
class Augmentation:
    """What is done to training pictures, all of it off by default; what is drawn depends on (seed, epoch, sample).

    Args:
        crop: which part of a picture is kept: its centre, any, or that of most saliency or entropy.
        flip: mirror every other picture.
        rotation: degrees that pictures are turned by at most, either way; magnified so that no corner is empty.
        brightness, contrast, saturation: factors are drawn from 1 - value to 1 + value, values up to 1.
        hue: shares of the colour circle, up to 0.5, that hues are turned by at most.
        colour_space: rgb, or lab for batches of CIE L*a*b* (D65) instead: validation, too.

    Raises:
        ValueError: a word or a number that is out of range.
    """

    crop: str = "centre"
    flip: bool = False
    rotation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    colour_space: str = "rgb"

    def __post_init__(self) -> None:
        for name, words in (("crop", CROPS), ("colour_space", COLOUR_SPACES)):
            if getattr(self, name) not in words:
                raise ValueError(f"augmentation.{name}: got {getattr(self, name)!r}, expected one of {list(words)}")
        limits = {"rotation": 180.0, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}
        for name, limit in limits.items():
            if not 0 <= getattr(self, name) <= limit:
                raise ValueError(f"augmentation.{name}: got {getattr(self, name)}, expected 0 to {limit:g}")

    @property
    def needs_whole(self) -> bool:
        """Whether the cut depends on the draw, so that the whole picture has to be at hand."""
        return self.crop == "random" or self.rotation > 0

    def cut(self, scaled: np.ndarray, target: tuple[int, int], draws: "SampleDraws") -> tuple[np.ndarray, Geometry]:
        """Cut `target` (width, height) out of uint8 (H, W, 3), turned; the geometry's `original` is the scaled size."""
        size = (scaled.shape[1], scaled.shape[0])
        left, top = self._offset(scaled, target, draws)
        if not self.rotation:
            geometry = Geometry(size, size, target, left, top)
            return scaled[top : top + target[1], left : left + target[0]], geometry
        geometry = _turned(size, target, (left, top), draws.of("rotation").uniform(-self.rotation, self.rotation))
        image = Image.fromarray(np.ascontiguousarray(scaled))
        turned = image.transform(target, Image.Transform.AFFINE, geometry.inverse(), Image.Resampling.BICUBIC)
        return np.asarray(turned), geometry

    def coloured(self, pixels: np.ndarray, draws: "SampleDraws") -> np.ndarray:
        """Return uint8 (H, W, 3) with its colours altered."""
        if not (self.brightness or self.contrast or self.saturation or self.hue):
            return pixels
        drawn = draws.of("colour").uniforms(4) * 2 - 1
        image = Image.fromarray(np.ascontiguousarray(pixels))
        changes = (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
        )
        for (enhance, strength), amount in zip(changes, drawn, strict=False):
            if strength:
                image = enhance(image).enhance(1 + strength * float(amount))
        if self.hue:
            hue, *others = image.convert("HSV").split()
            turned = np.asarray(hue) + np.uint8(round(self.hue * float(drawn[3]) * 255) % 256)
            image = Image.merge("HSV", [Image.fromarray(turned), *others]).convert("RGB")
        return np.asarray(image)

    def _offset(self, scaled: np.ndarray, target: tuple[int, int], draws: "SampleDraws") -> tuple[int, int]:
        rest = scaled.shape[1] - target[0], scaled.shape[0] - target[1]
        if self.crop == "random":
            stream = draws.of("crop")
            return stream.integer(0, rest[0]), stream.integer(0, rest[1])
        if self.crop == "centre" or not any(rest):
            return rest[0] // 2, rest[1] // 2
        return offset_of_interest(scaled, target, measure=self.crop)


@dataclass(frozen=True)
class SampleDraws:
    """Every stream of random numbers of one sample in one epoch."""

    seed: int
    epoch: int
    index: int

    def of(self, purpose: str) -> Draws:
        """Return the stream for a purpose, from its beginning."""
        return Draws(seed=self.seed, epoch=self.epoch, index=self.index, purpose=purpose)


def _turned(size: tuple[int, int], target: tuple[int, int], corner: Sequence[int], angle: float) -> Geometry:
    """Return the geometry of a cut turned by `angle` degrees: moved, and magnified if need be, to stay inside."""
    turn = radians(angle)
    wide = target[0] * abs(cos(turn)) + target[1] * abs(sin(turn))
    high = target[0] * abs(sin(turn)) + target[1] * abs(cos(turn))
    zoom = max(1.0, wide / size[0], high / size[1])
    middles = []
    for side, half, part, start in zip(size, (wide / zoom / 2, high / zoom / 2), target, corner, strict=True):
        middles.append(min(max(start + part / 2, half), side - half))
    left, top = round(middles[0] - target[0] / 2), round(middles[1] - target[1] / 2)
    return Geometry(size, size, target, left, top, angle=angle, zoom=zoom)
