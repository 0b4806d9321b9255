"""The embedding of a picture, under noise whose level is told: Stable Diffusion's unCLIP (after Ramesh et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.conditioners.base import Conditioner
from ldm.conditioners.draws import generator_of
from ldm.diffusion import Conditioning
from ldm.diffusion.schedules import Cosine
from ldm.nn import timestep_embedding
from ldm.nn.arguments import keeps_arguments

# Of its published config: squaredcos_cap_v2, 1000 steps.
SCHEDULE = Cosine()


class NoisyEmbedding(Conditioner):
    """Conditioning(vector (B, 2 * dim)) of batch["image_embedding"] (B, dim): it under noise, then the level.

    The level is a training step of the cosine schedule, drawn evenly. All that is drawn depends on (seed, position)
    alone. Zeros in place of the whole vector say that nothing is known of a picture.

    Args:
        dim: of the embedding: 1024 of OpenCLIP's ViT-H, 768 of CLIP's ViT-L.
        dropout: share of samples whose vector is zeros, whatever becomes of other conditions.
        seed: of noise, levels and dropout.

    Raises:
        ValueError: an odd dim, or a share out of range.
    """

    @keeps_arguments
    def __init__(self, dim: int = 1024, *, dropout: float = 0.25, seed: int = 0) -> None:
        super().__init__()
        if dim < 2 or dim % 2 or not 0 <= dropout <= 1:
            raise ValueError(f"got conditioner.dim={dim}, dropout={dropout}, expected an even number and 0 to 1")
        self.dim, self.dropout, self.seed = dim, dropout, seed
        # Holds no number: it follows the module from device to device, and is real even where that is the meta device.
        self.register_buffer("_place", torch.empty(0, device="cpu"), persistent=False)

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """Tells of batch["image_embedding"].

        Raises:
            ValueError: the batch has none, or one of another width.
        """
        if "image_embedding" not in batch:
            raise ValueError(f"got a batch with {sorted(batch)}, expected image_embedding; set derive=image_embedding")
        embedding: Tensor = batch["image_embedding"]
        if embedding.shape[1:] != (self.dim,):
            raise ValueError(
                f"got image embeddings {tuple(embedding.shape[1:])}, expected conditioner.dim={self.dim} numbers each"
            )
        drawn = [self._draw(position) for position in batch["position"].tolist()]
        levels, kept = torch.tensor([level for level, _, _ in drawn]), torch.tensor([kept for _, kept, _ in drawn])
        t = ((levels + 1) / SCHEDULE.num_steps).double()[:, None]
        eps = torch.stack([noise for _, _, noise in drawn]).to(embedding)
        noisy = SCHEDULE.alpha(t).to(embedding) * embedding + SCHEDULE.sigma(t).to(embedding) * eps
        told = torch.cat([noisy, timestep_embedding(levels, self.dim).to(noisy)], dim=1)
        place: Tensor = self._place  # type: ignore[assignment]
        return Conditioning(vector=(told * kept[:, None].to(told)).to(place))

    def _draw(self, position: int) -> tuple[int, bool, Tensor]:
        """(The level of one sample's noise, whether its vector is told, the noise)."""
        generator = generator_of("image_embedding", seed=self.seed, position=position)
        level = int(torch.randint(SCHEDULE.num_steps, (), generator=generator))
        kept = float(torch.rand((), generator=generator)) >= self.dropout
        return level, kept, torch.randn(self.dim, generator=generator)

    def null(self, n: int) -> Conditioning:
        """Nothing is known of the picture, n times."""
        place: Tensor = self._place  # type: ignore[assignment]
        return Conditioning(vector=place.new_zeros(n, 2 * self.dim))
