"""A picture to another: noise is added to it, and sampled away under a prompt (Meng et al. 2022, SDEdit)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.generation.pictures import Source, fitted, fitted_levels, read_levels, read_picture, to_image
from ldm.generation.sizes import two_sides
from ldm.generation.task import Order, Start, Task, check_strength, strength_times

if TYPE_CHECKING:
    from ldm.generation.pipeline import Pipeline, SamplingSettings


class ImageToImage(Task):
    """Starts from a picture with noise instead of from noise.

    Args:
        image: a picture or its file.
        strength: share of the sampling steps that are taken: 1 hardly keeps the image, 0.1 hardly changes it.
        depth: for a depth model alone, a picture or file of how near things are (brighter is nearer), of any range.
        image_size: one number or [height, width] that the image is scaled and cut to; None keeps its own size.

    Raises:
        ValueError: a file that cannot be read, or a strength out of range.
    """

    def __init__(
        self,
        image: Source,
        *,
        strength: float = 0.75,
        depth: Source | None = None,
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        self.strength = check_strength(strength)
        self.image, size = read_image(image, image_size)
        self.depth = None if depth is None else fitted_levels(read_levels(depth, name="depth"), size, mode="bicubic")

    def start(self, pipeline: Pipeline, orders: Sequence[Order], settings: SamplingSettings) -> Start:
        start = noised_image(pipeline, orders, settings, image=self.image, strength=self.strength)
        if self.depth is None:
            pipeline.require_plain()
            return start
        if pipeline.extra_channels != 1:
            raise ValueError(
                f"got depth for a model that takes {pipeline.extra_channels} channels besides the latents, expected "
                "a depth model, which takes 1; leave depth out"
            )
        depth = depth_condition(self.depth, start.x)
        return replace(start, cond=replace(start.cond, concat=depth), uncond=replace(start.uncond, concat=depth))


def read_image(source: Source, image_size: int | Sequence[int] | None) -> tuple[Tensor, tuple[int, int]]:
    """An image (1, 3, H, W) in [-1, 1], scaled and cut to `image_size` unless that is None, and its (H, W)."""
    picture = read_picture(source)
    size = (picture.height, picture.width) if image_size is None else two_sides(image_size)
    return to_image(fitted(picture, size)), size


def noised_image(
    pipeline: Pipeline, orders: Sequence[Order], settings: SamplingSettings, *, image: Tensor, strength: float
) -> Start:
    """The last steps, from an image (1 or B, 3, H, W) in [-1, 1] with as much noise as these start from.

    Each picture's noise draws first its own sample of the image's latents, then the noise that is added.
    """
    size = (image.shape[-2], image.shape[-1])
    noise = pipeline.noise(orders, size)
    times = strength_times(pipeline.times(settings), strength)
    cond, uncond = pipeline.conditions(orders, size)
    latents = pipeline.encode(image, noise())
    x = pipeline.denoiser.noised(latents, noise(), times[0].to(latents).expand(len(latents)))
    return Start(x, times, cond, uncond, noise)


def depth_condition(depth: Tensor, x: Tensor) -> Tensor:
    """A depth map (1, 1, H, W) as the network takes it: (B, 1, h, w) of the size of x, its range made [-1, 1].

    Raises:
        ValueError: it is the same everywhere.
    """
    small = interpolate(depth, size=x.shape[-2:], mode="bicubic", align_corners=False)
    low, high = small.amin(), small.amax()
    if low == high:
        raise ValueError("depth: got a picture that is the same everywhere, expected near and far")
    scaled = 2 * (small - low) / (high - low) - 1
    return scaled.to(device=x.device, dtype=torch.float32).expand(len(x), -1, -1, -1)
