"""Prompts and seeds to pictures."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from ldm.autoencoders import GaussianAutoencoder
from ldm.conditioners import Conditioner
from ldm.diffusion import Conditioning, Denoiser, Guidance
from ldm.generation.noise import SeededNoise
from ldm.generation.postprocess import to_pil
from ldm.samplers import Discretization, Sampler, State


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample.

    Args:
        num_steps: sampling steps; a sampler may ask the model more than once a step.
        image_size: height and width in pixels, a multiple of the autoencoder's downsampling factor.
    """

    sampler: Sampler
    discretization: Discretization
    guidance: Guidance
    num_steps: int
    image_size: int


class Pipeline:
    """A trained model, ready to sample.

    Args:
        denoiser, conditioner, autoencoder: the model's parts, on one device, in evaluation mode.
        settings: the defaults of `sample`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        conditioner: Conditioner,
        autoencoder: GaussianAutoencoder,
        settings: SamplingSettings,
    ) -> None:
        self.denoiser, self.conditioner, self.autoencoder = denoiser, conditioner, autoencoder
        self.settings = settings
        self.latent_shape(settings)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.denoiser.parameters()).device

    def sample(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        negative_prompt: str = "",
        batch_size: int = 64,
        **settings: Any,
    ) -> list[Image]:
        """One picture a prompt.

        Args:
            seeds: one a prompt; the same prompt and seed give the same picture whatever is sampled with it.
            negative_prompt: what guidance leads away from; "" is the null condition.
            settings: fields of `SamplingSettings` that differ from the model's own.
        """
        images = self.images(prompts, seeds=seeds, negative_prompt=negative_prompt, batch_size=batch_size, **settings)
        return to_pil(images)

    @torch.no_grad()
    def images(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        negative_prompt: str = "",
        batch_size: int = 64,
        **settings: Any,
    ) -> Tensor:
        """As `sample`, but images (N, 3, H, W) in [-1, 1]."""
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(
                f"got {len(prompts)} prompts and {len(seeds)} seeds, expected as many seeds as prompts, at least one"
            )
        chosen = replace(self.settings, **settings)
        batches = []
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            # Only the last state is kept: all of a long trajectory would not fit into memory.
            (last,) = deque(self.latent_states(prompts[part], seeds[part], negative_prompt, chosen), maxlen=1)
            batches.append(self.autoencoder.decode(last.x).clamp(-1, 1).float())
        return torch.cat(batches)

    @torch.no_grad()
    def trajectory(self, prompt: str, *, seed: int, **settings: Any) -> list[tuple[Image, Image]]:
        """Every step of one picture: (x_t decoded, the x_0 believed in then, decoded), from noise to data."""
        chosen = replace(self.settings, **settings)
        states = list(self.latent_states([prompt], [seed], "", chosen))
        beliefs = [state.prediction.x_0 for state in states[1:] if state.prediction is not None]
        noisy, believed = (
            to_pil(self.autoencoder.decode(torch.cat(latents))) for latents in ([s.x for s in states[1:]], beliefs)
        )
        return list(zip(noisy, believed, strict=True))

    def latent_states(
        self, prompts: Sequence[str], seeds: Sequence[int], negative_prompt: str, settings: SamplingSettings
    ) -> Iterator[State]:
        """The sampling trajectory of one batch, in latents (B, C, h, w)."""
        cond = self.conditioner({"caption": list(prompts)})
        uncond = self.negative(negative_prompt, len(prompts))
        schedule = self.denoiser.schedule
        times = settings.discretization(settings.num_steps, schedule)
        noise = SeededNoise(seeds, self.latent_shape(settings), device=self.device)
        x = noise() * schedule.prior_std(times[0])
        denoise = settings.guidance(self.denoiser, cond, uncond)
        return settings.sampler.trajectory(denoise, schedule, x, times=times, noise=noise)

    def latent_shape(self, settings: SamplingSettings) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        factor = self.autoencoder.downsampling_factor
        if settings.image_size < 1 or settings.image_size % factor:
            raise ValueError(
                f"got image_size={settings.image_size}, expected a multiple of {factor}, the autoencoder's factor"
            )
        return (self.autoencoder.latent_channels, settings.image_size // factor, settings.image_size // factor)

    def negative(self, prompt: str, n: int) -> Conditioning:
        """The condition that guidance leads away from, n times."""
        return self.conditioner({"caption": [prompt] * n}) if prompt else self.conditioner.null(n)
