"""From the bytes of a picture to the arrays of a sample: decode, scale, cut, mirror, colour, derive."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, Protocol

import numpy as np

from ldm.data.augmentation import Augmentation, SampleDraws
from ldm.data.draws import Draws
from ldm.data.geometry import Geometry
from ldm.data.jpeg import decode_pixels
from ldm.data.rows import pixels_stated
from ldm.data.transforms import cover, is_flipped, mirror, resize

# Columns that say where a picture was cut from, as SDXL's network is told (Podell et al. 2023, section 2.2).
CROP_COLUMNS = ("crop_top", "crop_left")
SIZE_COLUMNS = ("original_height", "original_width", *CROP_COLUMNS, "target_height", "target_width")


class Derived(Protocol):
    """Something made of a picture besides itself.

    Attributes:
        columns: what it reads of a sample's json.
    """

    columns: Sequence[str]

    def __call__(
        self, pixels: np.ndarray, *, row: Mapping[str, Any], geometry: Geometry, draws: Draws
    ) -> dict[str, np.ndarray]:
        """Return arrays by their name in the batch, made of uint8 (H, W, 3)."""
        ...


@dataclass(frozen=True)
class Loaded:
    """A picture before anything random: pixels uint8 (H, W, 3), own (width, height), and how it was cut, if it was."""

    pixels: np.ndarray
    original: tuple[int, int]
    geometry: Geometry | None


@dataclass(frozen=True)
class Pictures:
    """How pictures become samples.

    Args:
        augmentation: what is done to them; `flip` mirrors, too.
        derive: what is made of them besides.
        is_exact: decode every pixel; else JPEGs more than twice as large as needed are decoded at a half, a quarter or
            an eighth.
        seed: of all draws, with the epoch and the sample.
    """

    augmentation: Augmentation = field(default_factory=Augmentation)
    flip: bool = False
    derive: Derived | None = None
    is_exact: bool = True
    seed: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether a sample is the same in every epoch but for being mirrored, and cut at the centre."""
        return self.augmentation == Augmentation(
            flip=self.augmentation.flip, colour_space=self.augmentation.colour_space
        )

    def unaugmented(self) -> "Pictures":
        """Return how pictures become samples of validation: nothing random, but what is derived."""
        return replace(self, augmentation=Augmentation(colour_space=self.augmentation.colour_space), flip=False)

    def loader(self, target: tuple[int, int], *, keep: bool) -> Callable[[bytes], Loaded]:
        """Return what decodes a picture for samples of (width, height) `target`; `keep` says that they outlive it."""

        def load(content: bytes) -> Loaded:
            fit = None if self.is_exact else lambda size: cover(size, target)
            decoded, original = decode_pixels(content, fit=fit)
            scaled = resize(decoded, cover(original, target))
            if scaled is decoded:  # whose memory is the decoder's
                scaled = decoded.copy()
            if self.augmentation.needs_whole:
                return Loaded(scaled, original, None)
            # What is cut depends on no draw: the epoch and the index are never looked at.
            cut, geometry = self.augmentation.cut(scaled, target, SampleDraws(self.seed, 0, 0))
            return Loaded(np.ascontiguousarray(cut) if keep else cut, original, replace(geometry, original=original))

        return load

    def sample(
        self, loaded: Loaded, target: tuple[int, int], *, index: int, epoch: int, row: Mapping[str, Any]
    ) -> tuple[dict[str, np.ndarray], Geometry]:
        """Return the arrays of a sample in an epoch, "image" uint8 (H, W, 3) first, and where it was cut."""
        draws = SampleDraws(self.seed, epoch, index)
        pixels, geometry = loaded.pixels, loaded.geometry
        if geometry is None:
            pixels, geometry = self.augmentation.cut(pixels, target, draws)
            geometry = replace(geometry, original=loaded.original)
        if (self.flip or self.augmentation.flip) and is_flipped(seed=self.seed, epoch=epoch, index=index):
            pixels, geometry = mirror(pixels), geometry.flipped()
        pixels = self.augmentation.coloured(pixels, draws)
        arrays = {"image": pixels}
        if self.derive is not None:
            arrays |= self.derive(pixels, row=row, geometry=geometry, draws=draws.of("derive"))
        return arrays, geometry


def size_values(columns: Sequence[str], row: Mapping[str, Any], geometry: Geometry) -> dict[str, int]:
    """Return those of `columns` that say sizes in pixels: the original's by the json, where that says it."""
    (width, height), scales = geometry.target, [s / o for s, o in zip(geometry.scaled, geometry.original, strict=True)]
    known = {**crop_values(row, geometry.crop, scales=scales), "target_height": height, "target_width": width}
    for name, value in zip(("original_width", "original_height"), geometry.original, strict=True):
        known[name] = pixels_stated(row.get(name)) or value
    return {name: known[name] for name in columns if name in known}


def crop_values(row: Mapping[str, Any], crop: tuple[int, int], *, scales: Sequence[float]) -> dict[str, int]:
    """Return what is cut off above and to the left, in pixels of the scaled picture.

    A picture that was cut before, as its json says, has been cut by both: `scales` are (x, y) from its pixels to those
    of `crop`, (top, left).
    """
    values = {}
    for name, own, scale in zip(CROP_COLUMNS, crop, reversed(scales), strict=True):
        before = row.get(name)
        values[name] = own + (round(before * scale) if isinstance(before, int | float) and isfinite(before) else 0)
    return values
