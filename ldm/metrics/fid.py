"""Fréchet distance between two sets of images in the space of a feature network (FID with Inception's)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ldm.metrics.features import as_seen, describe_network, num_features_of
from ldm.metrics.products import add_gram_, both_halves
from ldm.metrics.statistics import Statistics


class FrechetDistance(Metric):
    """|mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) between generated and real images.

    What it is called depends on the features: FID (Inception, "2048"), sFID ("spatial"), clean-FID (resize
    "bicubic"), FD-DINOv2; rFID where the generated images are an autoencoder's reconstructions of the real ones.

    Sums of features and of their outer products are kept in float64 and added across ranks, so the value depends on
    neither batch size, nor order, nor number of ranks. torchmetrics' FrechetInceptionDistance keeps the same sums but
    takes the root from the eigenvalues of a non-symmetric product, asks for images in the network's own range and takes
    them without clamping; here the root comes from symmetric decompositions, as fast and exactly zero for identical
    sets, rank-deficient ones included. The tests hold the two to each other.

    Args:
        features: network from images (B, 3, H, W) in [-1, 1] to (B, num_features), with that attribute.
        reference: statistics of the real images, or an .npz with them as published; None takes real images.

    Raises:
        ValueError: a reference of other features; in `update`, real images beside a reference.

    Source: Heusel et al. 2017, eq. 6.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    network_name = "features"
    uses_real = True

    sums: Tensor
    outers: Tensor
    counts: Tensor

    def __init__(self, features: nn.Module, *, reference: Statistics | Path | str | None = None) -> None:
        super().__init__()
        size = num_features_of(features)
        self.features = features.eval()
        self.reference = open_reference(reference, features)
        self.has_warned = False
        # Row 0 generated, row 1 real.
        self.add_state("sums", torch.zeros(2, size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outers", torch.zeros(2, size, size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, real: bool) -> None:
        """Adds images (B, 3, H, W) in [-1, 1] to the real or to the generated set."""
        self.see(self.features(as_seen(images)), {}, real=real)

    def see(self, features: Tensor, batch: Mapping[str, Any], *, real: bool) -> None:
        """Adds images by their features (B, num_features); nothing else of the batch matters."""
        refuse_real_beside(self.reference, real)
        wide = features.double()
        self.sums[int(real)] += wide.sum(dim=0)
        add_gram_(self.outers[int(real)], wide)
        self.counts[int(real)] += len(wide)

    def check_counts(self, num_generated: int, num_real: int | None) -> None:
        """Raises ValueError below two images, and warns where there will be fewer than dimensions; None = unknown."""
        for side, count in (("generated", num_generated), ("real", num_real)):
            if count is not None and count < 2:
                raise ValueError(f"got {count} {side} images, expected at least 2 for a covariance; give more images")
        warn_of_few(num_generated, num_real, num_features_of(self.features))
        self.has_warned = True

    def refer_to(self, statistics: Statistics | Path | str) -> None:
        """Takes statistics, or a file of them, in the place of real images, as the argument `reference` does."""
        self.reference = open_reference(statistics, self.features)

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol: the feature network, and where the reference comes from."""
        return {"features": describe_network(self.features), **describe_reference(self.reference)}

    def statistics(self, *, real: bool, provenance: Mapping[str, Any] | None = None) -> Statistics:
        """Statistics of all images of one side over all ranks, to be written as a reference; every rank calls it.

        Args:
            provenance: of the data, e.g. its manifest hash; the feature network is added.

        Raises:
            ValueError: fewer than two images.
        """
        with self.sync_context(should_unsync=True):
            return self._statistics(int(real), {**(provenance or {}), "features": describe_network(self.features)})

    def compute(self) -> Tensor:
        """The distance, a float64 scalar; NaN while either set has fewer than two images."""
        used = self.counts[:1] if self.reference else self.counts
        if bool((used < 2).any()):
            return torch.full((), torch.nan, dtype=torch.float64, device=self.sums.device)
        generated = self._statistics(0, {})
        real = self.reference or self._statistics(1, {})
        if not self.has_warned:
            warn_of_few(generated.count, real.count, len(generated.mean))
        return frechet_distance(generated, real)

    def _statistics(self, row: int, provenance: Mapping[str, Any]) -> Statistics:
        count = int(self.counts[row])
        if count < 2:
            raise ValueError(f"got {count} images, expected at least 2 for a covariance; update with more first")
        mean, covariance = gaussian(self.sums[row], self.outers[row], self.counts[row])
        return Statistics(mean, covariance, count, provenance)


def open_reference(reference: Statistics | Path | str | None, features: nn.Module) -> Statistics | None:
    """The statistics of real images that a metric was given, or None.

    Raises:
        ValueError: they are of another size, or say that they are of other features.
    """
    if reference is None:
        return None
    if not isinstance(reference, Statistics):
        reference = Statistics.read(reference, suffix=getattr(features, "statistics_suffix", ""))
    size = num_features_of(features)
    if len(reference.mean) != size:
        raise ValueError(
            f"got reference statistics of {len(reference.mean)} features, expected {size}; give those of the same "
            "feature network"
        )
    theirs = reference.provenance.get("features")
    if theirs is not None and theirs != (ours := describe_network(features)):
        raise ValueError(f"got reference statistics of features {theirs}, expected {ours}; compute them with the same")
    return reference


def refuse_real_beside(reference: Statistics | None, real: bool) -> None:
    """Raises ValueError for real images beside a reference."""
    if real and reference is not None:
        raise ValueError("got real images beside reference statistics, expected one of the two; leave out one")


def describe_reference(reference: Statistics | None) -> dict[str, Any]:
    """What a protocol says of a reference: nothing where there is none."""
    if reference is None:
        return {}
    return {"reference": {"count": reference.count, **reference.provenance}}


def warn_of_few(num_generated: int | None, num_real: int | None, size: int) -> None:
    """Warns of fewer images than dimensions on either side; None = unknown."""
    if min(count for count in (num_generated, num_real, size) if count is not None) < size:
        warnings.warn(
            f"Fréchet distance of {num_generated} generated and {num_real} real images in "
            f"{size} dimensions: with fewer images than dimensions the value is biased upwards",
            stacklevel=3,
        )


def gaussian(total: Tensor, outer: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) from the sum (D,), the sum of outer products (D, D) and the count.

    Of the sum of outer products the upper half is read.
    """
    mean = total / count
    return mean, (both_halves(outer) - count * torch.outer(mean, mean)) / (count - 1)


def frechet_distance(one: Statistics, other: Statistics) -> Tensor:
    """Squared Fréchet distance between two Gaussians, a float64 scalar; never negative.

    With S_i = F_i F_i^T the eigenvalues of S_1 S_2 are the squared singular values of F_1^T F_2, so the trace of its
    root is the sum of the singular values themselves: real, not negative, and without the loss of half the digits that
    a root of small eigenvalues brings.
    """
    device = one.mean.device
    shift = (one.mean - other.mean.to(device)).square().sum()
    cross = torch.linalg.svdvals(one.factor.T @ other.factor.to(device)).sum()
    return (shift + one.covariance.trace() + other.covariance.trace().to(device) - 2 * cross).clamp_min(0)
