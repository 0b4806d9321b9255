"""A model, ready to make pictures: what tasks are built from, and the loop that carries them out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from ldm.autoencoders import Autoencoder
from ldm.conditioners import Conditioner, Unconditional
from ldm.diffusion import Conditioning, Denoiser, Guidance
from ldm.generation.memory import Memory, halve, offload
from ldm.generation.noise import BlendedNoise, SeededNoise
from ldm.generation.postprocess import to_pil
from ldm.generation.sizes import check_multiples, two_sides
from ldm.generation.task import Order, Start, Task
from ldm.generation.text_to_image import TextToImage
from ldm.samplers import Discretization, Sampler, State


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample.

    Args:
        num_steps: sampling steps; a sampler may ask the model more than once a step.
        image_size: height and width in pixels, one number where they are equal; multiples of what the autoencoder
            and the network divide by.
    """

    sampler: Sampler
    discretization: Discretization
    guidance: Guidance
    num_steps: int
    image_size: int | Sequence[int]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return two_sides(self.image_size)


@dataclass(frozen=True)
class Step:
    """One moment of the sampling of a batch.

    Args:
        part: which of the orders the batch is.
        number, num_steps: how many steps are done, from 0, of how many.
        state: latents (B, C, h, w), and the prediction that led there (None at the start).
    """

    part: slice
    number: int
    num_steps: int
    state: State

    @property
    def is_last(self) -> bool:
        """Whether the latents are the result."""
        return self.number == self.num_steps


class Pipeline:
    """A trained model, ready to sample.

    Args:
        denoiser, conditioner, autoencoder: the model's parts, on one device, in evaluation mode.
        settings: how to sample, where a call does not say.
        memory: what is done to fit the model into a small memory.
        device: where the model computes; None = where its weights are.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        conditioner: Conditioner,
        autoencoder: Autoencoder,
        settings: SamplingSettings,
        memory: Memory | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.denoiser, self.conditioner, self.autoencoder = denoiser, conditioner, autoencoder
        self.settings, self.memory = settings, memory or Memory()
        self._device = device
        self.latent_shape(settings.size)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._device or next(self.denoiser.parameters()).device

    def placed(self, device: torch.device | str, *, memory: Memory, half: bool = False) -> Pipeline:
        """The model on a device, in a small memory if need be; the parts are changed in place.

        Args:
            half: weights of 16 bits.
        """
        device = torch.device(device)
        if half:
            halve(self.denoiser.network, conditioner=self.conditioner, autoencoder=self.autoencoder, device=device)
        if memory.offload:
            offload(self.denoiser.network, device)
        else:
            for part in (self.denoiser, self.conditioner, self.autoencoder):
                part.to(device)
        return Pipeline(
            self.denoiser,
            conditioner=self.conditioner,
            autoencoder=self.autoencoder,
            settings=self.settings,
            memory=memory,
            device=device,
        )

    def sample(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        negative_prompt: str = "",
        batch_size: int = 64,
        **settings: Any,
    ) -> list[Image]:
        """One picture a prompt, from noise.

        Args:
            prompts: a text alone is one prompt.
            seeds: one a prompt; the same prompt and seed give the same picture whatever is sampled with it.
            negative_prompt: what guidance leads away from; "" is the null condition.
            settings: fields of `SamplingSettings` that differ from the model's own.
        """
        images = self.images(prompts, seeds=seeds, negative_prompt=negative_prompt, batch_size=batch_size, **settings)
        return to_pil(images)

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
        if isinstance(prompts, str):  # which is a sequence of its letters, too
            prompts = [prompts]
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(
                f"got {len(prompts)} prompts and {len(seeds)} seeds, expected as many seeds as prompts, at least one"
            )
        orders = [Order(prompt, seed, negative_prompt) for prompt, seed in zip(prompts, seeds, strict=True)]
        return self.draw(orders, task=TextToImage(), batch_size=batch_size, settings=replace(self.settings, **settings))

    def draw(self, orders: Sequence[Order], *, task: Task, settings: SamplingSettings, batch_size: int = 64) -> Tensor:
        """The images (N, 3, H, W) in [-1, 1] that are ordered."""
        # Only the last states are kept: all of a long trajectory would not fit into memory.
        steps = self.steps(orders, task=task, settings=settings, batch_size=batch_size)
        return torch.cat([task.finish(self.decode(step.state.x)) for step in steps if step.is_last])

    @torch.no_grad()
    def steps(
        self, orders: Sequence[Order], *, task: Task, settings: SamplingSettings, batch_size: int = 64
    ) -> Iterator[Step]:
        """Every step of the sampling, batch after batch: what previews, progress and trajectories are made from.

        Raises:
            ValueError: something is asked of guidance that can have no effect.
        """
        self.check_guidance(orders, settings.guidance)
        for part in self.batches(orders, batch_size):
            start = task.start(self, orders[part], settings)
            for number, state in enumerate(self.states(start, settings)):
                yield Step(part, number, len(start.times) - 1, state)

    def batches(self, orders: Sequence[Order], batch_size: int) -> Iterator[slice]:
        """Batches of orders that follow each other and whose prompts take as many chunks of tokens.

        In one batch all contexts have one length, and a longer one would show in the pictures of shorter prompts.
        """
        num_chunks = {text: self.conditioner.num_chunks(text) for text in {t for order in orders for t in order.texts}}
        first = 0
        for _, run in groupby(orders, lambda order: max(num_chunks[text] for text in order.texts)):
            last = first + len(list(run))
            for start in range(first, last, batch_size):
                yield slice(start, min(start + batch_size, last))
            first = last

    @torch.no_grad()
    def states(self, start: Start, settings: SamplingSettings) -> Iterator[State]:
        """The trajectory of one batch, in latents (B, C, h, w)."""
        guidance = settings.guidance
        if guidance.leads_from_null and equal(start.cond, start.uncond):
            # There is nothing to guide, and one evaluation a step does.
            guidance = Guidance()
        denoise = guidance(self.denoiser, start.cond, start.uncond)
        yield from settings.sampler.trajectory(
            denoise,
            self.denoiser.schedule,
            start.x,
            times=start.times,
            noise=start.noise,
            constrain=start.constrain,
        )

    def trajectory(self, prompt: str, *, seed: int, **settings: Any) -> list[tuple[Image, Image]]:
        """Every step of one picture: (x_t decoded, the x_0 believed in then, decoded), from noise to data."""
        chosen = replace(self.settings, **settings)
        steps = self.steps([Order(prompt, seed)], task=TextToImage(), settings=chosen)
        return [self.believed(step.state) for step in steps if step.number]

    def believed(self, state: State, *, row: int = 0) -> tuple[Image, Image]:
        """(x_t, the x_0 that the model believed in on the way there), decoded, of one picture of the batch."""
        assert state.prediction is not None
        noisy, x_0 = (to_pil(self.decode(x[row : row + 1]))[0] for x in (state.x, state.prediction.x_0))
        return noisy, x_0

    @property
    def extra_channels(self) -> int:
        """How many channels the network takes besides the noisy latents: 0 for models of text alone."""
        taken: int = getattr(self.denoiser.network, "in_channels", self.autoencoder.latent_channels)
        return taken - self.autoencoder.latent_channels

    def require_plain(self) -> None:
        """Raises ValueError for a network that needs more channels than those of the noisy latents."""
        if self.extra_channels:
            raise ValueError(
                f"got a model that takes {self.extra_channels} channels besides the latents, expected none for this "
                "task; 5 more are an inpainting model's (task=inpaint), 3 an upscaler's (task=upscale), 1 a depth "
                "model's (task=image_to_image depth=...)"
            )

    def check_guidance(self, orders: Sequence[Order], guidance: Guidance) -> None:
        """Raises ValueError for a negative prompt or a scale that was chosen and can have no effect."""
        negative = next((order.negative_prompt for order in orders if order.negative_prompt.strip()), None)
        if isinstance(self.conditioner, Unconditional):
            if guidance.scale != 1 and guidance.leads_from_null and guidance is not self.settings.guidance:
                raise ValueError(
                    f"got guidance.scale={guidance.scale:g} for a model without conditions, which has nothing to guide "
                    "to; expected none, or 1; leave it out"
                )
        elif guidance.scale == 1 and negative is not None:
            raise ValueError(
                f"got the negative prompt {negative!r} with guidance.scale=1, at which it has no effect; expected "
                "another scale, or no negative prompt; set guidance.scale=7.5, or leave negative_prompt out"
            )

    def times(self, settings: SamplingSettings) -> Tensor:
        """(num_steps + 1,) falling sampling times."""
        return settings.discretization(settings.num_steps, self.denoiser.schedule)

    def noise(self, orders: Sequence[Order], size: tuple[int, int]) -> SeededNoise:
        """Each picture's own noise, for latents of pictures of (height, width) pixels."""
        seeds, shape = [order.seed for order in orders], self.latent_shape(size)
        if all(order.other_seed is None for order in orders):
            return SeededNoise(seeds, shape, device=self.device)
        others = [order.seed if order.other_seed is None else order.other_seed for order in orders]
        amounts = [order.amount for order in orders]
        return BlendedNoise(seeds, shape, other_seeds=others, amounts=amounts, device=self.device)

    @torch.no_grad()
    def conditions(self, orders: Sequence[Order], size: tuple[int, int]) -> tuple[Conditioning, Conditioning]:
        """(what the pictures are to show, what guidance leads away from)."""
        prompts = [order.prompt for order in orders]
        others = [order.prompt if order.other_prompt is None else order.other_prompt for order in orders]
        negatives = [order.negative_prompt for order in orders]
        beside = dict.fromkeys(text for order in orders for text in order.all_prompts or ())
        texts = [*prompts, *(others if others != prompts else ()), *beside]
        with self.memory.at_work(self.conditioner, self.device):
            # In one call, so that all have as many tokens.
            filled = [*negatives, *[""] * (len(texts) - len(negatives))]
            cond, uncond = self.conditioner.prompt_pair(texts, filled, image_size=size)
        n = len(orders)
        if others == prompts:
            return cond[:n], uncond[:n]
        amounts = torch.tensor([order.amount for order in orders], device=self.device)
        return blend(cond[:n], cond[n : 2 * n], amounts), uncond[:n]

    @torch.no_grad()
    def encode(self, image: Tensor, noise: Tensor | None) -> Tensor:
        """Latents (B, C, h, w) of an image (1 or B, 3, H, W), sampled with noise (B, C, h, w), or the mean for None."""
        with self.memory.at_work(self.autoencoder, self.device):
            moments = self.memory.encode(self.autoencoder, image.to(self.device)).float()
            if noise is not None:
                moments = moments.expand(len(noise), *moments.shape[1:])
            return self.autoencoder.to_latents(moments, noise=noise)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1]."""
        with self.memory.at_work(self.autoencoder, self.device):
            return self.memory.decode(self.autoencoder, latents.to(self.device)).float().clamp(-1, 1)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of (height, width) pixels.

        Raises:
            ValueError: a side that the autoencoder and the network do not divide.
        """
        check_multiples(size, self.size_unit, what="a picture")
        factor = self.autoencoder.downsampling_factor
        return (self.autoencoder.latent_channels, size[0] // factor, size[1] // factor)

    @property
    def size_unit(self) -> int:
        """What height and width in pixels must be multiples of."""
        levels: int = getattr(self.denoiser.network, "downsampling_factor", 1)
        return self.autoencoder.downsampling_factor * levels


def equal(first: Conditioning, second: Conditioning) -> bool:
    """Whether two conditions of the same samples say the same, as where both say nothing."""
    parts, others = first.parts(), second.parts()
    return parts.keys() == others.keys() and all(torch.equal(part, others[name]) for name, part in parts.items())


def blend(start: Conditioning, end: Conditioning, amounts: Tensor) -> Conditioning:
    """Conditions on the straight line from start (amount 0) to end (1); a token counts where it is real at either.

    Args:
        amounts: (B,).
    """
    ends = end.parts()
    parts = {}
    for name, part in start.parts().items():
        if part.dtype == torch.bool:
            weight = amounts.view(-1, *[1] * (part.dim() - 1))
            parts[name] = (part & (weight < 1)) | (ends[name] & (weight > 0))
        else:
            weight = amounts.view(-1, *[1] * (part.dim() - 1)).to(part.dtype)
            parts[name] = torch.lerp(part, ends[name], weight)
    return Conditioning(**parts)
