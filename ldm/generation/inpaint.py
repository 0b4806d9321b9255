"""Part of a picture made anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.diffusion import Schedule
from ldm.generation.image_to_image import read_image
from ldm.generation.pictures import Source, fitted_levels, read_picture
from ldm.generation.task import Order, Start, Task, check_strength, strength_times
from ldm.samplers.base import Constrain

if TYPE_CHECKING:
    from ldm.generation.pipeline import Pipeline, SamplingSettings


class Repaint(Task):
    """Makes anew what a mask covers, to fit the rest of the image.

    An inpainting model is told mask and masked image, in channels of their own. With any other model the known part is
    put back after every step, with as much noise as the state has (Lugmayr et al. 2022, eq. 8).

    Args:
        image: (1, 3, H, W) in [-1, 1].
        mask: (1, 1, H, W), 1 where the picture is made anew and 0 where it is kept; between, the two are mixed.
        strength: share of the sampling steps that are taken; below 1, what the mask covers shapes what comes there.
        keep_pixels: put the image's own pixels back at the end, which the autoencoder alters a little.
    """

    def __init__(self, image: Tensor, *, mask: Tensor, strength: float, keep_pixels: bool) -> None:
        self.image, self.mask = image, mask
        self.strength, self.keep_pixels = check_strength(strength), keep_pixels

    def start(self, pipeline: Pipeline, orders: Sequence[Order], settings: SamplingSettings) -> Start:
        is_told = pipeline.extra_channels == pipeline.autoencoder.latent_channels + 1
        if not is_told:
            pipeline.require_plain()
        size = (self.image.shape[-2], self.image.shape[-1])
        noise = pipeline.noise(orders, size)
        times = strength_times(pipeline.times(settings), self.strength)
        cond, uncond = pipeline.conditions(orders, size)
        latents = None if is_told and self.strength == 1 else pipeline.encode(self.image, noise())
        eps = noise()
        x = self._first(pipeline, latents, eps, times[0])
        if is_told or latents is None:
            told = _what_is_told(pipeline, self.image, self.mask, None if cond.context is None else noise())
            concat = told.expand(len(eps), -1, -1, -1)
            return Start(x, times, replace(cond, concat=concat), replace(uncond, concat=concat), noise)
        mask = latent_mask(self.mask.to(eps), (eps.shape[-2], eps.shape[-1]))
        constrain = keep_known(latents, eps, mask=mask, times=times, schedule=pipeline.denoiser.schedule)
        return Start(x, times, cond, uncond, noise, constrain)

    def finish(self, images: Tensor) -> Tensor:
        if not self.keep_pixels:
            return images
        return torch.lerp(self.image.to(images), images, self.mask.to(images))

    def _first(self, pipeline: Pipeline, latents: Tensor | None, eps: Tensor, t: Tensor) -> Tensor:
        """The state that sampling starts from: noise alone at full strength."""
        if self.strength == 1 or latents is None:
            return eps * pipeline.denoiser.schedule.prior_std(t)
        return pipeline.denoiser.noised(latents, eps, t.to(eps).expand(len(eps)))


class Inpaint(Repaint):
    """Makes anew what is white in a mask.

    Args:
        image: a picture or its file.
        mask: a picture or file of the same size; white (or clear) is made anew, black is kept.
        strength, keep_pixels: as in `Repaint`.
        image_size: one number or [height, width] that both are scaled and cut to; None keeps the image's own size.

    Raises:
        ValueError: a file that cannot be read, a mask of another size or without white, a strength out of range.
    """

    def __init__(
        self,
        image: Source,
        mask: Source,
        *,
        strength: float = 1.0,
        keep_pixels: bool = True,
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        _, own_size = read_image(image, None)
        fitting, size = read_image(image, image_size)
        levels = fitted_levels(read_mask(mask, own_size), size, mode="nearest")
        super().__init__(fitting, mask=levels, strength=strength, keep_pixels=keep_pixels)


def read_mask(source: Source, size: tuple[int, int]) -> Tensor:
    """(1, 1, H, W) of zeros and ones, 1 where the picture is at least half white.

    Raises:
        ValueError: it is not of this (height, width), or nowhere white.
    """
    grey = np.asarray(read_picture(source, name="mask").convert("L"))
    if grey.shape != size:
        raise ValueError(
            f"mask: got {grey.shape[1]}x{grey.shape[0]} pixels for an image of {size[1]}x{size[0]}, expected the same "
            "size; scale the mask"
        )
    mask = torch.from_numpy((grey >= 128).astype(np.float32))[None, None]
    if not mask.any():
        raise ValueError(
            f"mask: got one without white (its brightest level is {grey.max()}), expected white, which is 255, where "
            "the picture is to be made anew"
        )
    return mask


def latent_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask (1, 1, H, W) at the size (h, w) of latents: picked where it is of zeros and ones, else averaged."""
    is_hard = bool(((mask == 0) | (mask == 1)).all())
    return interpolate(mask, size=size, mode="nearest" if is_hard else "area")


def keep_known(latents: Tensor, eps: Tensor, *, mask: Tensor, times: Tensor, schedule: Schedule) -> Constrain:
    """Puts latents (B, C, h, w) back where mask (1, 1, h, w) is 0, under their noise eps at the state's time.

    The last state is the result, and gets them without noise also where times end above 0.
    """

    def constrain(x: Tensor, s: Tensor) -> Tensor:
        known = schedule.alpha(s) * latents + schedule.sigma(s) * eps if s > times[-1] else latents
        return torch.lerp(known, x, mask)

    return constrain


def _what_is_told(pipeline: Pipeline, image: Tensor, mask: Tensor, noise: Tensor | None) -> Tensor:
    """The channels of an inpainting model.

    Stable Diffusion's are (mask, latents of the image with grey under the mask), with the mask of zeros and ones;
    those of LDM's model without text (Rombach et al. 2022, section 4.5) are (latents of the image with black under the
    mask, mask) with the mask of -1 and 1.

    Args:
        noise: (B, C, h, w) that the latents are sampled with; None is the model without text.
    """
    hard = (mask >= 0.5).to(image)
    colour = -1.0 if noise is None else 0.0
    latents = pipeline.encode(torch.where(hard == 1, colour, image), noise)
    small = latent_mask(hard, (latents.shape[-2], latents.shape[-1])).to(latents).expand(len(latents), -1, -1, -1)
    return torch.cat([latents, 2 * small - 1] if noise is None else [small, latents], dim=1)
