"""Vector quantisation: every latent becomes the nearest entry of a learned codebook."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

# Distances held at once while searching: 128 MiB of float32. Whole, 8 images of 64x64 latents take 1 GiB.
MAX_DISTANCES = 2**25


@dataclass(frozen=True)
class Quantized:
    """What quantising latents gives.

    Args:
        latents: (B, C, h, w) codebook entries, whose gradient passes straight through to what was quantised.
        codes: (B, h, w) int64, the entries' places in the codebook.
        loss: scalar, the codebook and commitment loss, at least float32.
    """

    latents: Tensor
    codes: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    """The nearest of `num_codes` learned entries of width C for each latent vector, in Euclidean distance.

    loss = codebook_weight * mean (sg[z] - e)^2 + commitment_weight * mean (z - sg[e])^2, sg stopping the gradient.
    van den Oord et al. 2017, eq. 3, put beta = 0.25 on the commitment. The code with which the published models of
    Esser et al. 2021 and Rombach et al. 2022 were trained has it on the codebook instead (`legacy` in
    taming-transformers, kept there for compatibility), so that is the default here; (1.0, 0.25) is the paper's.

    Args:
        num_codes: entries in the codebook.
        channels: C.
        codebook_weight: on the pull of entries towards latents.
        commitment_weight: on the pull of latents towards entries.

    Raises:
        ValueError: no codes, or a weight that is not positive: codebook or encoder would not learn.
    """

    def __init__(
        self, num_codes: int, channels: int, *, codebook_weight: float = 0.25, commitment_weight: float = 1.0
    ) -> None:
        super().__init__()
        if num_codes < 1:
            raise ValueError(f"got num_codes={num_codes}, expected at least 1; raise it")
        if codebook_weight <= 0 or commitment_weight <= 0:
            raise ValueError(
                f"got codebook_weight={codebook_weight} and commitment_weight={commitment_weight}, expected both "
                "positive, or one side would not move; the published models have 0.25 and 1.0"
            )
        self.embedding = nn.Embedding(num_codes, channels)
        nn.init.uniform_(self.embedding.weight, -1.0 / num_codes, 1.0 / num_codes)
        self.codebook_weight, self.commitment_weight = codebook_weight, commitment_weight

    @property
    def num_codes(self) -> int:
        """Entries in the codebook."""
        return self.embedding.num_embeddings

    def forward(self, z: Tensor) -> Quantized:
        """Quantise z (B, C, h, w), in the units of the codebook."""
        codes = self.codes(z)
        entries = self.entries(codes)
        exact = z if z.dtype == torch.float64 else z.float()
        codebook = (exact.detach() - entries).square().mean()
        commitment = (exact - entries.detach()).square().mean()
        loss = self.codebook_weight * codebook + self.commitment_weight * commitment
        return Quantized(z + (entries - z).detach().to(z.dtype), codes, loss)

    @torch.no_grad()
    def codes(self, z: Tensor) -> Tensor:
        """Places (B, h, w) in the codebook of the entries nearest to z (B, C, h, w); the first of equals.

        |z - e|^2 is least where z e - |e|^2 / 2 is greatest, in float32 at least; searched in parts, since all
        distances together outweigh every activation of the decoder.
        """
        batch, _, height, width = z.shape
        exact = torch.float64 if z.dtype == torch.float64 else torch.float32
        vectors = rearrange(z, "b c h w -> (b h w) c").to(exact)
        codebook = self.embedding.weight.to(exact)
        half_norms = 0.5 * codebook.square().sum(1)
        # The meta device, on which memory and work are counted, has no autocast to switch off.
        with nullcontext() if z.is_meta else torch.autocast(z.device.type, enabled=False):
            parts = vectors.split(max(1, MAX_DISTANCES // self.num_codes))
            nearest = [(part @ codebook.T - half_norms).argmax(1) for part in parts]
        return rearrange(torch.cat(nearest), "(b h w) -> b h w", b=batch, h=height, w=width)

    def entries(self, codes: Tensor) -> Tensor:
        """The codebook's entries (B, C, h, w) at codes (B, h, w)."""
        return rearrange(self.embedding(codes), "b h w c -> b c h w")
