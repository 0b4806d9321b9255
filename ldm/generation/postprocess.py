"""From tensors to pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from einops import rearrange
from PIL import Image
from torch import Tensor


def to_pil(images: Tensor) -> list[Image.Image]:
    """8-bit RGB pictures from images (B, 3, H, W) in [-1, 1], clipped and rounded."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    return [Image.fromarray(picture.numpy()) for picture in rearrange(pixels, "b c h w -> b h w c").contiguous()]


def grid(pictures: Sequence[Image.Image], *, num_columns: int | None = None, padding: int = 2) -> Image.Image:
    """Pictures of one size side by side, row by row, on white; as square as it gets if num_columns is None."""
    columns = num_columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + padding) + padding, rows * (height + padding) + padding), "white")
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        sheet.paste(picture, (padding + column * (width + padding), padding + row * (height + padding)))
    return sheet


def strip(rows: Sequence[Sequence[Image.Image]], *, padding: int = 2) -> Image.Image:
    """Rows of as many pictures each, such as the noisy and the denoised steps of a trajectory, below each other."""
    return grid([picture for row in rows for picture in row], num_columns=len(rows[0]), padding=padding)
