"""Fréchet distance between two sets of images in the space of a feature network (FID with Inception's)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ldm.metrics.features import as_seen, num_features_of


class FrechetDistance(Metric):
    """|mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) between generated and real images.

    Sums of features and of their outer products are kept in float64 and added across ranks, so the value depends on
    neither batch size, nor order, nor number of ranks. torchmetrics' FrechetInceptionDistance keeps the same sums but
    takes the root from the eigenvalues of a non-symmetric product, asks for images in the network's own range and takes
    them without clamping; here the root comes from symmetric decompositions, as fast and exactly zero for identical
    sets, rank-deficient ones included. The tests hold the two to each other.

    Args:
        features: network from images (B, 3, H, W) in [-1, 1] to (B, num_features), with that attribute.

    Source: Heusel et al. 2017, eq. 6.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    sums: Tensor
    outers: Tensor
    counts: Tensor

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        size = num_features_of(features)
        self.features = features.eval()
        # Row 0 generated, row 1 real.
        self.add_state("sums", torch.zeros(2, size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outers", torch.zeros(2, size, size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, real: bool) -> None:
        """Adds images (B, 3, H, W) in [-1, 1] to the real or to the generated set."""
        features = self.features(as_seen(images)).double()
        self.sums[int(real)] += features.sum(dim=0)
        self.outers[int(real)] += features.T @ features
        self.counts[int(real)] += len(features)

    def reset_generated(self) -> None:
        """Forgets the generated images and keeps the real ones, which do not change from one evaluation to the next."""
        for total in (self.sums, self.outers, self.counts):
            total[0] = 0
        self._computed = None

    def compute(self) -> Tensor:
        """The distance, a float64 scalar; NaN while either set has fewer than two images."""
        size = self.sums.shape[1]
        if bool((self.counts < 2).any()):
            return torch.full((), torch.nan, dtype=torch.float64, device=self.sums.device)
        if bool((self.counts < size).any()):
            warnings.warn(
                f"Fréchet distance of {int(self.counts[0])} generated and {int(self.counts[1])} real images in "
                f"{size} dimensions: with fewer images than dimensions the value is biased upwards",
                stacklevel=2,
            )
        generated, real = (gaussian(self.sums[i], self.outers[i], self.counts[i]) for i in (0, 1))
        return frechet_distance(*generated, *real)


def gaussian(total: Tensor, outer: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) from the sum (D,), the sum of outer products (D, D) and the count."""
    mean = total / count
    return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)


def frechet_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> Tensor:
    """Squared Fréchet distance between two Gaussians with means (D,) and covariances (D, D); never negative."""
    cross = trace_sqrt_product(covariance_1, covariance_2)
    distance = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * cross
    return distance.clamp_min(0)


def trace_sqrt_product(covariance_1: Tensor, covariance_2: Tensor) -> Tensor:
    """tr (S_1 S_2)^(1/2) of two positive semi-definite matrices (D, D).

    With S_i = F_i F_i^T the eigenvalues of S_1 S_2 are the squared singular values of F_1^T F_2, so their roots are
    the singular values themselves: real, not negative, and without the loss of half the digits that a root of small
    eigenvalues brings.
    """
    return torch.linalg.svdvals(_factor(covariance_1).T @ _factor(covariance_2)).sum()


def _factor(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    # Eigenvalues below the rounding of the largest are rank deficiency, not spread.
    noise = len(values) * torch.finfo(values.dtype).eps * values.amax()
    return vectors * torch.where(values > noise, values, 0).sqrt()
