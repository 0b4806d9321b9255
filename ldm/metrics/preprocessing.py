"""What happens to pixels before a feature network sees them: resizing and JPEG, each as it was published.

Published values differ by more than a point with the filter alone (Parmar et al. 2022), so every network names its own.
Nothing here relies on a library's default: torchvision and torchmetrics have both changed theirs for `antialias`.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from ldm.metrics.features import as_seen, describe_network, num_features_of, quantize


def resize_tf1_bilinear(pixels: Tensor, size: int) -> Tensor:
    """Float pixels (B, C, H, W) to (B, C, size, size) as TensorFlow 1's `resize_bilinear` did: output pixel i lies at
    i * H / size, without the half pixel, and no filter guards against aliasing.

    Source: the resizing inside the 2015-12-05 Inception graph, which published FIDs went through.
    """
    for dim in (3, 2):
        length = pixels.shape[dim]
        place = torch.arange(size, dtype=torch.float32, device=pixels.device) * (length / size)
        low = place.long()
        high = (low + 1).clamp_max(length - 1)
        shape = [-1, *([1] * (3 - dim))]
        share = (place - low).to(pixels.dtype).view(shape)
        below, above = pixels.index_select(dim, low), pixels.index_select(dim, high)
        pixels = below + (above - below) * share
    return pixels


def resize_bicubic(pixels: Tensor, size: int) -> Tensor:
    """Float pixels (B, C, H, W) in [0, 255] to (B, C, size, size) by Pillow's bicubic filter on float images: with
    antialiasing, a = -0.5, clamped to the range and not rounded. This is clean-fid's rule.

    Source: Parmar et al. 2022, section 3.
    """
    return _interpolate(pixels, size, "bicubic").clamp(0, 255)


def resize_bilinear(pixels: Tensor, size: int) -> Tensor:
    """Float pixels (B, C, H, W) to (B, C, size, size) by Pillow's bilinear filter, with antialiasing, not rounded."""
    return _interpolate(pixels, size, "bilinear")


def _interpolate(pixels: Tensor, size: int, mode: str) -> Tensor:
    return functional.interpolate(pixels, (size, size), mode=mode, align_corners=False, antialias=True)


RESIZERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "tf1_bilinear": resize_tf1_bilinear,
    "bicubic": resize_bicubic,
    "bilinear": resize_bilinear,
}


def resizer(name: str) -> Callable[[Tensor, int], Tensor]:
    """The resizing of that name; raises ValueError where there is none."""
    if name not in RESIZERS:
        raise ValueError(f"got resize={name!r}, expected one of {', '.join(RESIZERS)}")
    return RESIZERS[name]


def resize_like_pillow(images: Tensor, shape: tuple[int, int], mode: str) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] to whole levels (B, 3, *shape) in [0, 255] by Pillow's filter "bicubic" or
    "bilinear" on 8-bit images, which filters rows, rounds, then filters columns.
    """
    pixels = quantize(images).float()
    for step in ((pixels.shape[-2], shape[1]), shape):
        if step != tuple(pixels.shape[-2:]):
            pixels = functional.interpolate(pixels, step, mode=mode, align_corners=False, antialias=True)
            pixels = pixels.clamp(0, 255).round()
    return pixels


def resize_and_crop(images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] to whole levels (B, 3, size, size) in [0, 255]: shorter side to `size` by
    Pillow's filter, then the centre. This is CLIP's preparation.
    """
    height, width = images.shape[-2:]
    # torchvision's rule for the longer side.
    tall, wide = (max(size, size * side // min(height, width)) for side in (height, width))
    pixels = resize_like_pillow(images, (tall, wide), mode)
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    return pixels[:, :, top : top + size, left : left + size]


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as they come back from a JPEG of that quality (Pillow, 4:2:0), float32."""
    pixels = rearrange(quantize(images), "b c h w -> b h w c").cpu().numpy()
    decoded = torch.from_numpy(np.stack([_through_jpeg(picture, quality) for picture in pixels]))
    return rearrange(decoded, "b h w c -> b c h w").to(images.device).float() / 127.5 - 1


def _through_jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    stream = BytesIO()
    Image.fromarray(picture).save(stream, format="JPEG", quality=quality)
    return np.asarray(Image.open(stream))


class JPEGFeatures(nn.Module):
    """Features of images after JPEG compression: gives both sets the compression that a data set came with.

    Compression of one side alone moves FID by points (Parmar et al. 2022, section 4).

    Args:
        features: the network behind it.
        quality: 1 to 100, Pillow's scale.

    Raises:
        ValueError: a quality that JPEG does not know.
    """

    def __init__(self, features: nn.Module, *, quality: int = 75) -> None:
        super().__init__()
        if not 1 <= quality <= 100:
            raise ValueError(f"got quality={quality}, expected 1 to 100")
        self.features = features
        self.quality = quality
        self.num_features = num_features_of(features)

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol: the network's own description and the quality."""
        return {**describe_network(self.features), "jpeg_quality": self.quality}

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, num_features) of images (B, 3, H, W) in [-1, 1]."""
        return self.features(jpeg(as_seen(images), self.quality))
