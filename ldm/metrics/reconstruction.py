"""How close an autoencoder's reconstructions are to their originals, pixel by pixel: PSNR and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from ldm.metrics.features import quantize

# Identical images have no noise: their PSNR counts as this, where the 8 bits of a large image end.
HIGHEST_PSNR = 100.0
# Half of SSIM's window, and its width, in pixels.
BORDER, SIGMA = 5, 1.5


class ReconstructionQuality(Metric):
    """PSNR in dB and SSIM of reconstructions, each the mean and the standard deviation over images.

    Images are compared as their 8-bit PNGs. PSNR is 10 log10(255^2 / mean squared error) of one image, at most 100 dB;
    SSIM takes a Gaussian window of 11 pixels and sigma 1.5 over each colour channel and, as its authors do, only places
    where the whole window lies in the image: torchmetrics' own average counts mirrored borders too.

    Raises:
        ValueError: in `update`, images of two shapes, or smaller than the window.

    Source: Wang et al. 2004; as reported by Rombach et al. 2022, table 8 (mean and deviation over images).
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    sums: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Columns: PSNR, SSIM.
        self.add_state("sums", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, originals: Tensor) -> None:
        """Adds images and originals, both (B, C, H, W) in [-1, 1], each side at least 11 pixels."""
        if images.shape != originals.shape or min(images.shape[-2:]) < 11:
            raise ValueError(
                f"got images {tuple(images.shape)} with originals {tuple(originals.shape)}, expected one shape of at "
                "least 11 x 11 pixels"
            )
        ours, theirs = quantize(images).double(), quantize(originals).double()
        values = torch.stack([psnr(ours, theirs), ssim(ours, theirs)], dim=1)
        self.sums += values.sum(dim=0)
        self.squares += values.square().sum(dim=0)
        self.count += len(values)

    def compute(self) -> dict[str, Tensor]:
        """`psnr`, `psnr_std`, `ssim` and `ssim_std` (population), float64 scalars; NaN without images."""
        means = self.sums / self.count
        deviations = (self.squares / self.count - means.square()).clamp_min(0).sqrt()
        return {"psnr": means[0], "psnr_std": deviations[0], "ssim": means[1], "ssim_std": deviations[1]}


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images (B, C, H, W) with levels 0 to 255."""
    error = (images - originals).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(255**2 / error)).clamp_max(HIGHEST_PSNR)


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity (B,) of images (B, C, H, W) with levels 0 to 255.

    Source: Wang et al. 2004, eq. 13, with K_1 = 0.01 and K_2 = 0.03.
    """
    mean, mean_original = windowed(images), windowed(originals)
    variance = windowed(images.square()) - mean.square()
    variance_original = windowed(originals.square()) - mean_original.square()
    covariance = windowed(images * originals) - mean * mean_original
    c_1, c_2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    alike = (2 * mean * mean_original + c_1) * (2 * covariance + c_2)
    places = alike / ((mean.square() + mean_original.square() + c_1) * (variance + variance_original + c_2))
    return places.flatten(1).mean(dim=1)


def windowed(maps: Tensor) -> Tensor:
    """Means of maps (B, C, H, W) over every Gaussian window of 11 pixels inside: (B, C, H - 10, W - 10).

    As shifted sums, first of columns and then of rows: in float64 some forty times as fast as a convolution.
    """
    weights = torch.exp(torch.arange(-BORDER, BORDER + 1, dtype=torch.float64).square() / (-2 * SIGMA**2))
    for dim in (-1, -2):
        length = maps.shape[dim] - 2 * BORDER
        shifted = (weight * maps.narrow(dim, i, length) for i, weight in enumerate((weights / weights.sum()).tolist()))
        maps = sum(shifted, torch.zeros((), dtype=maps.dtype, device=maps.device))
    return maps
