"""Improved precision and recall: the share of generated images among real ones, and the other way round."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.metrics.feature_bank import FeatureBank
from ldm.metrics.neighbours import blocks, neighbour_radii


class PrecisionRecall(FeatureBank):
    """Precision: generated images within the k-nearest-neighbour ball of any real one. Recall: real within generated.

    Precision speaks of quality, recall of variety. Both depend on the number of images: published values take 50,000
    generated ones, and as real ones as many or (ADM on ImageNet) 10,000.

    Args:
        features: network from images (B, 3, H, W) in [-1, 1] to (B, num_features), with that attribute.
        k: neighbours; 3 in published values.
        max_images: kept on each side.
        seed: of what is kept.
        chunk_size: distances are taken in blocks of this many rows and columns.

    Raises:
        ValueError: k or chunk_size below 1; in `compute`, no more than k images in a set.

    Source: Kynkäänniemi et al. 2019, eq. 1 and 2.
    """

    higher_is_better = True

    def __init__(
        self, features: nn.Module, *, k: int = 3, max_images: int = 50_000, seed: int = 0, chunk_size: int = 2048
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
        """`precision` and `recall` in [0, 1], float64 scalars."""
        generated, real = self.kept("generated"), self.kept("real")
        precision, recall = precision_recall(generated, real, k=self.k, chunk_size=self.chunk_size)
        return {"precision": precision, "recall": recall}


def precision_recall(generated: Tensor, real: Tensor, *, k: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Both for features (N, D) and (M, D), float64 scalars."""
    radii_generated = neighbour_radii(generated, k, chunk_size=chunk_size)
    radii_real = neighbour_radii(real, k, chunk_size=chunk_size)
    precise = torch.zeros(len(generated), dtype=torch.bool, device=generated.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, columns, squares in blocks(real, generated, chunk_size):
        precise[columns] |= (squares <= radii_real[rows, None]).any(dim=0)
        recalled[rows] |= (squares <= radii_generated[columns]).any(dim=1)
    return precise.double().mean(), recalled.double().mean()
