"""Exact area averaging: a pixel of the smaller picture is the mean of what it covers in the larger one."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

# Pixels made by one product of matrices: more would multiply by more zeros, fewer would call more often.
BLOCK = 16


def reduce_area(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an RGB or grey image down to (width, height), each pixel the mean of the area that it covers.

    Pixels that are covered in part count in part, unlike those of Pillow's box filter; OpenCV calls this INTER_AREA.
    Raises ValueError where a side would grow.
    """
    (width, height), num_bands = size, len(image.getbands())
    if width > image.width or height > image.height:
        raise ValueError(f"size: got {size}, expected at most the {image.size} of the picture, which area can reduce")
    pixels = np.asarray(image).reshape(image.height, -1)
    rows = np.empty((height, pixels.shape[1]), dtype=np.float32)
    for made, covered, weights in _spans(image.height, height):
        np.matmul(weights, pixels[covered].astype(np.float32), out=rows[made])
    means = np.empty((height, width * num_bands), dtype=np.float32)
    for made, covered, weights in _spans(image.width, width):
        # The bands of a pixel lie beside each other, and do not mix.
        columns = rows[:, covered.start * num_bands : covered.stop * num_bands]
        by_band = np.zeros((weights.shape[1], num_bands, weights.shape[0], num_bands), dtype=np.float32)
        for band in range(num_bands):
            by_band[:, band, :, band] = weights.T
        matrix = by_band.reshape(columns.shape[1], -1)
        means[:, made.start * num_bands : made.stop * num_bands] = columns @ matrix
    levels = np.rint(means).clip(0, 255).astype(np.uint8)
    return Image.fromarray(levels.reshape((height, width, num_bands) if num_bands > 1 else (height, width)))


def _spans(length: int, count: int) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Cut `length` pixels into `count` equal spans, some at a time.

    Yields which spans, which pixels they cover, and float32 (spans, pixels): the share of each pixel in each mean.
    """
    step = length / count
    for first in range(0, count, BLOCK):
        made = np.arange(first, min(first + BLOCK, count))[:, None]
        start, end = made * step, np.minimum((made + 1) * step, length)
        covered = np.arange(int(start[0, 0]), min(int(np.ceil(end[-1, 0])), length))
        shares = np.clip(np.minimum(covered + 1, end) - np.maximum(covered, start), 0, None)
        weights = (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)
        yield slice(first, first + len(made)), slice(int(covered[0]), int(covered[-1]) + 1), weights
