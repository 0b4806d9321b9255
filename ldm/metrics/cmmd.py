"""CMMD: the squared maximum mean discrepancy of CLIP embeddings under a Gaussian kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.metrics.feature_bank import FeatureBank

SIGMA = 10.0
SCALE = 1000.0


class CLIPDiscrepancy(FeatureBank):
    """1000 MMD^2 with the kernel exp(-|x - y|^2 / (2 * 10^2)) between generated and real CLIP embeddings: CMMD.

    The estimator is the one that published values were computed with, which counts each image's kernel with itself
    (biased, never negative). Kernels are summed a block at a time; N x N numbers are never held.

    Args:
        features: network from images (B, 3, H, W) in [-1, 1] to embeddings of length 1, e.g. `OpenCLIPFeatures`.
        max_images: kept on each side.
        seed: of what is kept.
        chunk_size: rows and columns of a block.

    Raises:
        ValueError: no rows in a block.

    Source: Jayasumana et al. 2024, section 4.
    """

    higher_is_better = False

    def __init__(self, features: nn.Module, *, max_images: int = 50_000, seed: int = 0, chunk_size: int = 2048) -> None:
        super().__init__(features, max_images=max_images, seed=seed)
        if chunk_size < 1:
            raise ValueError(f"got chunk_size={chunk_size}, expected at least 1")
        self.chunk_size = chunk_size

    def compute(self) -> Tensor:
        """The distance, a float64 scalar; NaN while either set is empty."""
        generated, real = self.kept("generated"), self.kept("real")
        return SCALE * gaussian_mmd(generated, real, sigma=SIGMA, chunk_size=self.chunk_size)


def gaussian_mmd(a: Tensor, b: Tensor, *, sigma: float, chunk_size: int) -> Tensor:
    """Biased squared MMD of (N, D) and (M, D) under exp(-|x - y|^2 / (2 sigma^2)), float64; NaN for empty sets.

    Source: Gretton et al. 2012, eq. 5.
    """
    within = _mean_kernel(a, a, sigma, chunk_size) + _mean_kernel(b, b, sigma, chunk_size)
    return within - 2 * _mean_kernel(a, b, sigma, chunk_size)


def _mean_kernel(a: Tensor, b: Tensor, sigma: float, chunk_size: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for rows in a.split(chunk_size):
        x = rows.double()
        for columns in b.split(chunk_size):
            y = columns.double()
            squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T
            total += torch.exp(squares / (-2 * sigma**2)).sum()
    return total / (len(a) * len(b))
