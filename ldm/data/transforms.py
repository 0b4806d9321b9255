"""From a decoded image to the pixels of a batch."""

from hashlib import blake2b

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Elements from which on torch shares work among threads.
PARALLEL_FROM = 2**15


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
    width, height = cover(size, (resolution, resolution))
    return width, height, (width - resolution) // 2, (height - resolution) // 2


def cover(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest (width, height) in the proportions of `size` that covers `target`."""
    scale = max(part / side for part, side in zip(target, size, strict=True))
    width, height = (max(part, round(side * scale)) for part, side in zip(target, size, strict=True))
    return width, height


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale uint8 (H, W, 3) to (width, height), antialiased: within one level of Pillow's bicubic filter."""
    if pixels.shape[1::-1] == size:
        return pixels
    # The batch axis goes first, so that torch sees channels last, for which it has a kernel over bytes.
    image = _tensor(pixels)[None].permute(0, 3, 1, 2)
    scaled = torch.nn.functional.interpolate(image, size=size[::-1], mode="bicubic", antialias=True)
    return np.asarray(scaled[0].permute(1, 2, 0).numpy())


def mirror(pixels: np.ndarray) -> np.ndarray:
    """Mirror uint8 (H, W, 3) left to right: by torch, in a tenth of numpy's time."""
    # In parts so small that torch does each in this thread: else every thread of a loader gets a team of others.
    parts = _tensor(pixels).split(max(1, PARALLEL_FROM // (3 * pixels.shape[1])))
    return np.asarray(torch.cat([part.flip(1) for part in parts]).numpy())


def _tensor(pixels: np.ndarray) -> Tensor:
    """Return pixels as a tensor: their own memory, unless it is Pillow's, which must not be written."""
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())


def is_flipped(*, seed: int, epoch: int, index: int) -> bool:
    """Toss the coin for mirroring a sample: a function of these three alone."""
    # A hash, because setting up a Philox generator for a single bit takes 30 times as long.
    digest = blake2b(b"flip %d %d %d" % (seed, epoch, index), digest_size=1).digest()
    return bool(digest[0] & 1)


def to_pixels(image: np.ndarray) -> Tensor:
    """Turn uint8 (H, W, 3) into float32 (3, H, W) in [-1, 1]."""
    return to_float(_tensor(np.ascontiguousarray(image)).permute(2, 0, 1))


def to_float(image: Tensor) -> Tensor:
    """Turn bytes (..., H, W) into float32 in [-1, 1], contiguous, on the device where they are."""
    return image.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
