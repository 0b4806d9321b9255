"""Density and coverage: precision and recall that outliers do not distort."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.metrics.feature_bank import FeatureBank
from ldm.metrics.neighbours import blocks, neighbour_radii


class DensityCoverage(FeatureBank):
    """Density: in how many real balls a generated image lies, over k. Coverage: share of real balls that hold one.

    Balls are those of the real images alone, to the k-th nearest neighbour. Of two equal distributions density is 1
    (and it may exceed 1), coverage 1 - 2^-k or so.

    Args:
        features: network from images (B, 3, H, W) in [-1, 1] to (B, num_features), with that attribute.
        k: neighbours; 5 in published values.
        max_images: kept on each side.
        seed: of what is kept.
        chunk_size: distances are taken in blocks of this many rows and columns.

    Raises:
        ValueError: k or chunk_size below 1; in `compute`, no more than k real images.

    Source: Naeem et al. 2020, eq. 2 and 3.
    """

    higher_is_better = True

    def __init__(
        self, features: nn.Module, *, k: int = 5, max_images: int = 50_000, seed: int = 0, chunk_size: int = 2048
    ) -> None:
        super().__init__(features, max_images=max_images, seed=seed)
        if k < 1 or chunk_size < 1:
            raise ValueError(f"got k={k} and chunk_size={chunk_size}, expected at least 1 of each")
        self.k, self.chunk_size = k, chunk_size

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol."""
        return {**super().describe(), "k": self.k}

    def least_images(self) -> tuple[int, str]:
        """One more than neighbours."""
        return self.k + 1, f"more than k={self.k}"

    def compute(self) -> dict[str, Tensor]:
        """`density` (0 or more) and `coverage` in [0, 1], float64 scalars."""
        generated, real = self.kept("generated"), self.kept("real")
        density, coverage = density_coverage(generated, real, k=self.k, chunk_size=self.chunk_size)
        return {"density": density, "coverage": coverage}


def density_coverage(generated: Tensor, real: Tensor, *, k: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Both for features (N, D) and (M, D), float64 scalars."""
    radii = neighbour_radii(real, k, chunk_size=chunk_size)
    inside = torch.zeros((), dtype=torch.int64, device=real.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    # Real images are the rows, as they are for the radii: equal distances then round alike.
    for rows, _, squares in blocks(real, generated, chunk_size):
        within = squares < radii[rows, None]
        inside += within.sum()
        covered[rows] |= within.any(dim=1)
    return inside.double() / (k * len(generated)), covered.double().mean()
