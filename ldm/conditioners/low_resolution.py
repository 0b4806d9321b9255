"""What an upscaler is told: the small picture, under some noise whose level it knows (Ho et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioners.base import Conditioner
from ldm.conditioners.draws import generator_of
from ldm.diffusion import Conditioning
from ldm.diffusion.schedules import ScaledLinear
from ldm.nn.arguments import keeps_arguments

# The noise of the published x4 upscaler (linear_start and linear_end of its config), by training step.
SCHEDULE = ScaledLinear(beta_start=1e-4, beta_end=0.02)


class LowResolution(Conditioner):
    """Conditioning(concat (B, 3, h, w)) of batch["low_res"] in [-1, 1]; dropout leaves it as it is.

    With `max_noise_level` the small picture is under the noise of a training step drawn evenly from 0 to that, which
    goes to the network as class id, vector (B,): so the x4 upscaler of Stable Diffusion was trained, with 350 of 1000
    steps. Without, the picture is told as it is (LDM's bsr_sr). Noise and level depend on (seed, position) alone.

    Args:
        max_noise_level: the highest step, or None.
        upscale: the small picture is brought to so many times its size, linearly, as networks over pixels take it
            (Dhariwal & Nichol 2021); over latents it has their size already.
        seed: of noise and level.

    Raises:
        ValueError: a level that is no training step, or an upscale below 1.
    """

    @keeps_arguments
    def __init__(self, max_noise_level: int | None = None, *, upscale: int = 1, seed: int = 0) -> None:
        super().__init__()
        if max_noise_level is not None and not 0 <= max_noise_level < SCHEDULE.num_steps:
            raise ValueError(
                f"got conditioner.max_noise_level={max_noise_level}, expected 0 to {SCHEDULE.num_steps - 1}, or null"
            )
        if upscale < 1:
            raise ValueError(f"got conditioner.upscale={upscale}, expected 1 or more")
        self.max_noise_level, self.upscale, self.seed = max_noise_level, upscale, seed
        self.always_told = ("concat",) if max_noise_level is None else ("concat", "vector")

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """Tells of batch["low_res"].

        Raises:
            ValueError: the batch has none.
        """
        if "low_res" not in batch:
            raise ValueError(f"got a batch with {sorted(batch)}, expected low_res; set derive=low_resolution")
        image: Tensor = batch["low_res"]
        if self.max_noise_level is None:
            return Conditioning(concat=self._of_size(image))
        draws = [self._draw(position, image.shape[1:]) for position in batch["position"].tolist()]
        levels = torch.tensor([level for level, _ in draws])
        eps = torch.stack([noise for _, noise in draws]).to(image)
        t = ((levels + 1) / SCHEDULE.num_steps).double().view(-1, 1, 1, 1)
        noisy = SCHEDULE.alpha(t).to(image) * image + SCHEDULE.sigma(t).to(image) * eps
        return Conditioning(concat=self._of_size(noisy), vector=levels.to(image.device))

    def _of_size(self, image: Tensor) -> Tensor:
        return image if self.upscale == 1 else F.interpolate(image, scale_factor=self.upscale, mode="bilinear")

    def _draw(self, position: int, shape: Sequence[int]) -> tuple[int, Tensor]:
        """The level of one sample's noise, and the noise."""
        generator = generator_of("low_res", seed=self.seed, position=position)
        level = int(torch.randint((self.max_noise_level or 0) + 1, (), generator=generator))
        return level, torch.randn(tuple(shape), generator=generator)

    def null(self, n: int) -> Conditioning:
        """Nothing: the small picture is told in any case."""
        return Conditioning()

    def prompt_pair(
        self, prompts: Sequence[str], negatives: Sequence[str], *, image_size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning]:
        """Nothing, twice: the task tells the network of the small picture."""
        return Conditioning(), Conditioning()
