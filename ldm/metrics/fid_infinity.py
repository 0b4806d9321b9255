"""FID-infinity: the Fréchet distance extrapolated to infinitely many generated images."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.metrics.feature_bank import FeatureBank, subset
from ldm.metrics.fid import describe_reference, frechet_distance, open_reference, refuse_real_beside
from ldm.metrics.statistics import Statistics


class FrechetInfinity(FeatureBank):
    """Value at 1/N = 0 of a line through Fréchet distances of subsets of N generated images against 1/N.

    The Fréchet distance is biased upwards by about c / N with a c that depends on the generator, so that at equal N
    two models may come out in the wrong order; the extrapolated value does not. Real images are taken all at once.

    Args:
        features: network from images (B, 3, H, W) in [-1, 1] to (B, num_features), with that attribute.
        reference: statistics of the real images, or an .npz with them as published; None takes real images.
        num_points: subsets, of sizes evenly spaced from `smallest` to all images, drawn with `seed`.
        smallest: images of the smallest subset.
        max_images: kept on each side.
        seed: of what is kept and of the subsets.

    Raises:
        ValueError: fewer than two points or images; in `compute`, no more images than the smallest subset.

    Source: Chong and Forsyth 2020, section 4: 15 subsets from 5,000 to 50,000 images, drawn anew for each size.
    """

    higher_is_better = False

    def __init__(
        self,
        features: nn.Module,
        *,
        reference: Statistics | Path | str | None = None,
        num_points: int = 15,
        smallest: int = 5000,
        max_images: int = 50_000,
        seed: int = 0,
    ) -> None:
        super().__init__(features, max_images=max_images, seed=seed)
        if num_points < 2 or smallest < 2:
            raise ValueError(f"got num_points={num_points} and smallest={smallest}, expected at least 2 of each")
        self.reference = open_reference(reference, features)
        self.num_points, self.smallest = num_points, smallest

    def update(self, images: Tensor, index: Tensor, real: bool) -> None:
        """Adds images (B, 3, H, W) in [-1, 1] with their places (B,) in the real or in the generated set."""
        refuse_real_beside(self.reference, real)
        super().update(images, index, real)

    def see(self, features: Tensor, batch: Mapping[str, Any], *, real: bool) -> None:
        """As in `FeatureBank`."""
        refuse_real_beside(self.reference, real)
        super().see(features, batch, real=real)

    def refer_to(self, statistics: Statistics | Path | str) -> None:
        """Takes statistics, or a file of them, in the place of real images, as the argument `reference` does."""
        self.reference = open_reference(statistics, self.features)

    def check_counts(self, num_generated: int, num_real: int | None) -> None:
        """Raises ValueError where there will be no more generated images than the smallest subset."""
        self._check_generated(num_generated)

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol."""
        points = {"num_points": self.num_points, "smallest": self.smallest}
        return {**super().describe(), **points, **describe_reference(self.reference)}

    def compute(self) -> Tensor:
        """The extrapolated distance, a float64 scalar, which noise may bring below zero."""
        generated = self.kept("generated")
        self._check_generated(len(generated))
        real = self.reference or Statistics.of(self.kept("real"))
        generator = torch.Generator().manual_seed(self.seed)
        sizes = torch.linspace(self.smallest, len(generated), self.num_points, dtype=torch.float64).long()
        if self.smallest < self.size:
            warnings.warn(
                f"FID-infinity from {self.smallest} images in {self.size} dimensions: with fewer images than "
                "dimensions the distance does not fall as 1/N; raise smallest",
                stacklevel=2,
            )
        distances = []
        for size in sizes.tolist():
            chosen = subset(len(generated), size, generator).to(generated.device)
            distances.append(frechet_distance(Statistics.of(generated[chosen]), real))
        return intercept(1 / sizes.to(generated.device).double(), torch.stack(distances))

    def _check_generated(self, count: int) -> None:
        if count <= self.smallest:
            raise ValueError(
                f"got {count} generated images, expected more than smallest={self.smallest}; give more images or a "
                "lower smallest"
            )


def intercept(x: Tensor, y: Tensor) -> Tensor:
    """Value at 0 of the least-squares line through the points (x, y), both (P,)."""
    centred = x - x.mean()
    slope = (centred * y).sum() / centred.square().sum()
    return y.mean() - slope * x.mean()
