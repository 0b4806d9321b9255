"""A small picture made larger by a model that was trained to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.diffusion.schedules import ScaledLinear
from ldm.generation.image_to_image import read_image
from ldm.generation.pictures import Source
from ldm.generation.sizes import check_multiples
from ldm.generation.task import Order, Start, Task

if TYPE_CHECKING:
    from ldm.generation.pipeline import Pipeline, SamplingSettings

# The noise that the small picture gets, as in the published x4 upscaler (linear_start, linear_end of its config).
LOW_RESOLUTION_SCHEDULE = ScaledLinear(beta_start=1e-4, beta_end=0.02)
DEFAULT_NOISE_LEVEL, MAX_NOISE_LEVEL = 20, 350


class Upscale(Task):
    """Tells the network a small picture, in channels of its own; the result is as much larger as latents are smaller.

    A network that takes class ids, as the x4 upscaler of Stable Diffusion, is told the picture under some noise and how
    much (Ho et al. 2022, conditioning augmentation); another, as LDM's bsr_sr, the picture itself.

    Args:
        image: a picture or its file.
        noise_level: training step of the noise, from 0 to 350; more lets the model invent more. None is 20.
        image_size: one number or [height, width] that the image is scaled and cut to first; None keeps its own size.

    Raises:
        ValueError: a file that cannot be read, or a noise level out of range.
    """

    def __init__(
        self, image: Source, *, noise_level: int | None = None, image_size: int | Sequence[int] | None = None
    ) -> None:
        if noise_level is not None and not 0 <= noise_level <= MAX_NOISE_LEVEL:
            raise ValueError(f"got noise_level={noise_level}, expected 0 to {MAX_NOISE_LEVEL}, the highest trained")
        self.image, self.size = read_image(image, image_size)
        self.noise_level = noise_level

    def start(self, pipeline: Pipeline, orders: Sequence[Order], settings: SamplingSettings) -> Start:
        image = self.image.to(pipeline.device)
        if pipeline.extra_channels != image.shape[1]:
            raise ValueError(
                f"got a model that takes {pipeline.extra_channels} channels besides the latents, expected an upscaler, "
                "which takes 3; use task=two_pass, which works with any model"
            )
        factor = pipeline.autoencoder.downsampling_factor
        # Here and not of the result: image_size is that of the small picture.
        check_multiples(self.size, pipeline.size_unit // factor, what="a picture to enlarge")
        size = (self.size[0] * factor, self.size[1] * factor)
        noise = pipeline.noise(orders, size)
        cond, uncond = pipeline.conditions(orders, size)
        parts = self._told(image, noise.draw(image.shape[1:]), takes_level=_takes_class_ids(pipeline))
        times = pipeline.times(settings)
        x = noise() * pipeline.denoiser.schedule.prior_std(times[0])
        return Start(x, times, replace(cond, **parts), replace(uncond, **parts), noise)

    def _told(self, image: Tensor, eps: Tensor, *, takes_level: bool) -> dict[str, Tensor]:
        """The parts of the condition: the small image (B, 3, h, w) and, for some networks, the level of its noise."""
        if takes_level:
            level = DEFAULT_NOISE_LEVEL if self.noise_level is None else self.noise_level
            return {
                "concat": noised(image, eps, level),
                "vector": torch.full((len(eps),), level, dtype=torch.int64, device=image.device),
            }
        if self.noise_level is not None:
            raise ValueError(
                f"got noise_level={self.noise_level} for a network that is not told of noise, expected none; "
                "leave it out"
            )
        return {"concat": image.expand(len(eps), -1, -1, -1)}


def noised(image: Tensor, eps: Tensor, level: int) -> Tensor:
    """An image (1, 3, h, w) under the noise eps (B, 3, h, w) of a training step."""
    t = torch.tensor((level + 1) / LOW_RESOLUTION_SCHEDULE.num_steps, dtype=torch.float64)
    return LOW_RESOLUTION_SCHEDULE.alpha(t).float() * image + LOW_RESOLUTION_SCHEDULE.sigma(t).float() * eps


def _takes_class_ids(pipeline: Pipeline) -> bool:
    arguments = getattr(pipeline.denoiser.network, "arguments", {})
    return arguments.get("num_classes") is not None
