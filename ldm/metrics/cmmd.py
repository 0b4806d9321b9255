"""CMMD: the squared maximum mean discrepancy of CLIP embeddings under a Gaussian kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.metrics.feature_bank import FeatureBank
from ldm.metrics.products import pair_sums

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

    Source: Jayasumana et al. 2024, section 4.
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The distance, a float64 scalar; NaN while either set is empty."""
        generated, real = self.kept("generated"), self.kept("real")
        return SCALE * gaussian_mmd(generated, real, sigma=SIGMA)


def gaussian_mmd(a: Tensor, b: Tensor, *, sigma: float) -> Tensor:
    """Biased squared MMD of (N, D) and (M, D) under exp(-|x - y|^2 / (2 sigma^2)), float64; NaN for empty sets.

    Source: Gretton et al. 2012, eq. 5.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T
        return torch.exp(squares / (-2 * sigma**2))

    # An image beside itself has the kernel 1.
    within_a, within_b = ((pair_sums(kernel, x)[0] + len(x)) / len(x) ** 2 for x in (a, b))
    return within_a + within_b - 2 * pair_sums(kernel, a, b)[0] / (len(a) * len(b))
