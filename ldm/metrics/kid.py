"""Kernel Inception distance: the squared maximum mean discrepancy under a polynomial kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.metrics.feature_bank import FeatureBank, subset
from ldm.metrics.products import pair_sums


class KernelDistance(FeatureBank):
    """Unbiased MMD^2 with the kernel (x.y / D + 1)^3, averaged over subsets of both sets; KID with Inception's pool.

    Unlike the Fréchet distance it is unbiased at any number of images, and the spread over subsets says how sure the
    value is. Kernels are float64 and computed a block at a time, so memory beyond the features is a few blocks; where
    there are fewer pairs of images than the subsets hold together, each pair is computed once for all of them.

    Args:
        features: network from images (B, 3, H, W) in [-1, 1] to (B, num_features), with that attribute.
        num_subsets: drawn with `seed`, each without repetition.
        subset_size: images of each set in a subset.
        max_images: kept on each side to draw from.
        seed: of what is kept and of the subsets.

    Raises:
        ValueError: no subset or fewer than two images in one; in `compute`, fewer images than a subset needs.

    Source: Bińkowski et al. 2018, section 4; 100 subsets of 1,000 as there.
    """

    higher_is_better = False

    def __init__(
        self,
        features: nn.Module,
        *,
        num_subsets: int = 100,
        subset_size: int = 1000,
        max_images: int = 50_000,
        seed: int = 0,
    ) -> None:
        super().__init__(features, max_images=max_images, seed=seed)
        if num_subsets < 1 or subset_size < 2:
            raise ValueError(f"got {num_subsets} subsets of {subset_size} images, expected at least 1 of at least 2")
        self.num_subsets, self.subset_size = num_subsets, subset_size

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol."""
        return {**super().describe(), "num_subsets": self.num_subsets, "subset_size": self.subset_size}

    def least_images(self) -> tuple[int, str]:
        """A subset's."""
        return self.subset_size, f"subset_size={self.subset_size}"

    def compute(self) -> dict[str, Tensor]:
        """`kid`, the mean over subsets; `kid_std`, their standard deviation (population), as published beside it;
        `kid_low` and `kid_high`, between which 95 % of them lie. float64 scalars.
        """
        generated, real = self.kept("generated"), self.kept("real")
        for side, features in (("generated", generated), ("real", real)):
            if len(features) < self.subset_size:
                raise ValueError(
                    f"got {len(features)} {side} images for KID, expected at least subset_size={self.subset_size}; "
                    "give more images or a smaller subset_size"
                )
        values = self._distances(generated, real)
        low, high = values.quantile(values.new_tensor([0.025, 0.975]))
        return {"kid": values.mean(), "kid_std": values.std(correction=0), "kid_low": low, "kid_high": high}

    def _distances(self, generated: Tensor, real: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        sizes = len(generated), len(real)
        drawn = [[subset(count, self.subset_size, generator) for count in sizes] for _ in range(self.num_subsets)]
        rows, columns = (torch.stack(places).to(generated.device) for places in zip(*drawn, strict=True))
        return polynomial_mmds(generated, real, rows, columns)


def polynomial_mmds(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Unbiased squared MMD, (S,) in float64, of each subset a[rows[s]] beside b[columns[s]] under (x.y / D + 1)^3.

    It may be below zero.

    Args:
        a, b: features (N, D) and (M, D).
        rows, columns: (S, n) and (S, m), places without repetition.
    """
    n, m = rows.shape[1], columns.shape[1]
    within = _sums(a, None, rows, rows) / (n * (n - 1)) + _sums(b, None, columns, columns) / (m * (m - 1))
    return within - 2 * _sums(a, b, rows, columns) / (n * m)


def _sums(a: Tensor, b: Tensor | None, rows: Tensor, columns: Tensor) -> Tensor:
    """Sum of the kernel over all pairs of each subset, (S,)."""
    others = a if b is None else b
    if len(a) * len(others) <= rows.numel() * columns.shape[1]:
        return pair_sums(_kernel, a, b, weights=(_members(rows, len(a)), _members(columns, len(others))))
    parts = [
        pair_sums(_kernel, a[row], None if b is None else b[column]) for row, column in zip(rows, columns, strict=True)
    ]
    return torch.cat(parts)


def _members(places: Tensor, count: int) -> Tensor:
    """(count, S) of 1 where an image belongs to a subset, of the places (S, n) in it."""
    members = torch.zeros(len(places), count, dtype=torch.float64, device=places.device)
    return members.scatter_(1, places, 1.0).T


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T).div_(a.shape[1]).add_(1).pow_(3)
