"""From a decoded image to the pixels of a batch."""

from hashlib import blake2b

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def resize_and_crop(image: Image.Image, resolution: int) -> np.ndarray:
    """Scale an RGB image's short side to `resolution`, antialiased, and cut out the centre: uint8 (H, W, 3), H = W."""
    if image.size != (resolution, resolution):
        width, height, left, top = crop_box(image.size, resolution)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + resolution, top + resolution))
    return np.array(image)


def crop_box(size: tuple[int, int], resolution: int) -> tuple[int, int, int, int]:
    """Say what becomes of an image of (width, height) pixels: its scaled width and height, and what is cut off.

    Returns (width, height, left, top) in pixels of the scaled image; (left, top) is SDXL's crop condition.
    """
    scale = resolution / min(size)
    width, height = (max(resolution, round(side * scale)) for side in size)
    return width, height, (width - resolution) // 2, (height - resolution) // 2


def is_flipped(*, seed: int, epoch: int, index: int) -> bool:
    """Toss the coin for mirroring a sample: a function of these three alone."""
    # A hash, because setting up a Philox generator for a single bit takes 30 times as long.
    digest = blake2b(b"flip %d %d %d" % (seed, epoch, index), digest_size=1).digest()
    return bool(digest[0] & 1)


def to_pixels(image: np.ndarray) -> Tensor:
    """Turn uint8 (H, W, 3) into float32 (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
