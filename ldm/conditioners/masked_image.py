"""What an inpainting model is told: the picture without what is masked, and the mask (Rombach et al. 2022, 4.5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.conditioners.base import Conditioner
from ldm.diffusion import Conditioning
from ldm.nn.arguments import keeps_arguments

# How published models are told, by what is under the mask: grey or black.
CONVENTIONS = {"stable_diffusion": 0.0, "latent_diffusion": -1.0}


class MaskedImage(Conditioner):
    """Conditioning(concat (B, C + 1, h, w)) of batch["image"] and batch["mask"]; dropout leaves it as it is.

    `stable_diffusion`: the mask of zeros and ones, then the latents of the image with grey under the mask.
    `latent_diffusion`, the model without text: the latents of the image with black under the mask, then the mask of
    -1 and 1. Sampling, `ldm.generation.Inpaint`, tells models with a context the first and others the second.

    Args:
        convention: stable_diffusion or latent_diffusion.

    Raises:
        ValueError: another convention.
    """

    always_told = ("concat",)

    @keeps_arguments
    def __init__(self, convention: str = "stable_diffusion") -> None:
        super().__init__()
        if convention not in CONVENTIONS:
            raise ValueError(f"got conditioner.convention={convention!r}, expected one of {list(CONVENTIONS)}")
        self.convention = convention

    def pictures(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The image with nothing but one colour under the mask, whose latents `forward` reads.

        Raises:
            ValueError: the batch has no image or no mask.
        """
        if missing := [name for name in ("image", "mask") if name not in batch]:
            raise ValueError(
                f"got a batch with {sorted(batch)}, expected {' and '.join(missing)}; train on shards of images "
                "with derive=mask"
            )
        return {"masked_image": torch.where(batch["mask"] >= 0.5, CONVENTIONS[self.convention], batch["image"])}

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """Joins batch["masked_image_latents"] (B, C, h, w) and the mask at their size."""
        latents: Tensor = batch["masked_image_latents"]
        mask = interpolate((batch["mask"] >= 0.5).to(latents), size=latents.shape[-2:], mode="nearest")
        is_first = self.convention == "stable_diffusion"
        return Conditioning(concat=torch.cat([mask, latents] if is_first else [latents, 2 * mask - 1], dim=1))

    def null(self, n: int) -> Conditioning:
        """Nothing: what is known of the picture is told in any case."""
        return Conditioning()

    def prompt_pair(
        self, prompts: Sequence[str], negatives: Sequence[str], *, image_size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning]:
        """Nothing, twice: the task tells the network of picture and mask."""
        return Conditioning(), Conditioning()
