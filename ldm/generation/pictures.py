"""Picture files to tensors: what tasks start from."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.data.shards import decode_image
from ldm.data.transforms import to_pixels

Source = str | Path | Image.Image
"""A picture, or the file that holds it."""


def read_picture(source: Source, *, name: str = "image") -> Image.Image:
    """An upright 8-bit RGB picture: turned as its EXIF data says, transparency laid on white, 16 bits scaled to 8.

    Args:
        name: of the setting, for error messages.

    Raises:
        ValueError: there is no such file, or it is no whole JPEG, PNG or WebP picture.
    """
    return source.convert("RGB") if isinstance(source, Image.Image) else _read(source, name, decode_image)


def read_levels(source: Source, *, name: str) -> Tensor:
    """Grey levels (1, 1, H, W), float32: from 0 to 255, or as many as a picture of 16 bits has.

    Raises:
        ValueError: as `read_picture`.
    """
    grey = source if isinstance(source, Image.Image) else _read(source, name, _decode_grey)
    if not grey.mode.startswith("I"):
        grey = grey.convert("L")
    return torch.from_numpy(np.asarray(grey).astype(np.float32))[None, None]


def to_image(picture: Image.Image) -> Tensor:
    """An image (1, 3, H, W) in [-1, 1]."""
    return to_pixels(np.array(picture))[None]


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture scaled to cover (height, width), antialiased, and cut at the centre; untouched where it fits."""
    height, width = size
    if picture.size == (width, height):
        return picture
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def fitted_levels(levels: Tensor, size: tuple[int, int], *, mode: str) -> Tensor:
    """Levels (1, 1, H, W) scaled and cut as `fitted` does with the picture that they belong to.

    Args:
        mode: of interpolation: "nearest" makes no new levels.
    """
    old, new = levels.shape[-2:], size
    scale = max(new[0] / old[0], new[1] / old[1])
    height, width = (max(round(side * scale), least) for side, least in zip(old, new, strict=True))
    scaled = interpolate(levels, size=(height, width), mode=mode)
    top, left = (height - new[0]) // 2, (width - new[1]) // 2
    return scaled[..., top : top + new[0], left : left + new[1]]


def _read(path: str | Path, name: str, decode: Callable[[bytes], Image.Image]) -> Image.Image:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{name}: got {path}, where there is no file; expected a JPEG, PNG or WebP picture")
    try:
        return decode(file.read_bytes())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no picture" if isinstance(error, Image.UnidentifiedImageError) else " ".join(str(error).split())
        raise ValueError(
            f"{name}: got {path}, which cannot be read ({reason}); expected a whole JPEG, PNG or WebP picture"
        ) from error


def _decode_grey(content: bytes) -> Image.Image:
    """As `decode_image`, but 16 bits stay 16."""
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as image:
        if not image.mode.startswith("I"):
            return decode_image(content).convert("L")
        image.load()
        return ImageOps.exif_transpose(image)
