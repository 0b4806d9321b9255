"""What every autoencoder with a Gaussian posterior shares: moments, the posterior, and the scale of its latents."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor, nn

LOGVAR_RANGE = (-30.0, 20.0)
IMAGE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent normal distributions, one for each latent value; mean and logvar are (B, C, h, w)."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> "DiagonalGaussian":
        """Split moments (B, 2C, h, w) into mean and logvar, the latter clamped to [-30, 20]."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(*LOGVAR_RANGE))

    @property
    def std(self) -> Tensor:
        """Standard deviation (B, C, h, w)."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        """Give mean + std * noise for standard normal noise (B, C, h, w)."""
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """Give the most likely latents, the mean."""
        return self.mean

    def kl(self) -> Tensor:
        """Divergence from the standard normal: (B,) nats, summed over all latent values, at least float32.

        sum of (mean^2 + var - 1 - logvar) / 2. Source: Kingma and Welling 2014, appendix B.
        """
        dtype = torch.float64 if self.mean.dtype == torch.float64 else torch.float32
        mean, logvar = self.mean.to(dtype), self.logvar.to(dtype)
        return 0.5 * reduce(mean.square() + logvar.exp() - 1.0 - logvar, "b c h w -> b", "sum")


class GaussianAutoencoder(nn.Module, ABC):
    """An autoencoder whose moments (B, 2C, h, w) are the mean and log-variance of its latents.

    Subclasses give `encode` and `decode`. The buffers `latent_scale` and `latent_shift` (scalars) are the
    autoencoder's own: latents = (sample - shift) * scale. Raises ValueError for a scale that is not positive.
    """

    latent_scale: Tensor
    latent_shift: Tensor

    def __init__(
        self, *, latent_channels: int, downsampling_factor: int, latent_scale: float = 1.0, latent_shift: float = 0.0
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.downsampling_factor = downsampling_factor
        self.register_buffer("latent_scale", torch.ones(()))
        self.register_buffer("latent_shift", torch.zeros(()))
        self.set_latent_scale(latent_scale, latent_shift)

    def set_latent_scale(self, scale: float, shift: float = 0.0) -> None:
        """Set the scale and shift between samples and latents, in place."""
        if not (math.isfinite(scale) and scale > 0 and math.isfinite(shift)):
            raise ValueError(
                f"got a latent scale of {scale} and shift of {shift}, expected a positive and a finite number; "
                "measure them on latents that are finite and not constant"
            )
        self.latent_scale.fill_(scale)
        self.latent_shift.fill_(shift)

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to unscaled moments (B, 2C, h, w)."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Map scaled latents (B, C, h, w) to images (B, 3, H, W), about in [-1, 1]."""

    def posterior(self, moments: Tensor) -> DiagonalGaussian:
        """The distribution of unscaled latents that moments (B, 2C, h, w) stand for."""
        return DiagonalGaussian.from_moments(moments)

    def to_latents(self, moments: Tensor, *, noise: Tensor | None) -> Tensor:
        """Scaled latents (B, C, h, w): a sample by standard normal noise (B, C, h, w), or the mean for None."""
        posterior = self.posterior(moments)
        latents = posterior.mode() if noise is None else posterior.sample(noise)
        return (latents - self.latent_shift) * self.latent_scale

    def from_latents(self, latents: Tensor) -> Tensor:
        """Undo the scale: latents (B, C, h, w) as `to_latents` gives them, back to the posterior's units."""
        return latents / self.latent_scale + self.latent_shift

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError unless images (B, C, H, W) lie in [-1, 1] and divide into latents."""
        height, width = images.shape[-2:]
        factor = self.downsampling_factor
        if height % factor or width % factor:
            raise ValueError(f"got images of {height}x{width}, expected multiples of {factor}; crop or resize them")
        # One reduction and one transfer; NaN fails the comparison too.
        extent = images.detach().abs().amax().item()
        if not extent <= 1.0 + IMAGE_TOLERANCE:
            raise ValueError(
                f"got images with values up to {extent:g} in size, expected [-1, 1]; scale 0..255 by x / 127.5 - 1"
            )
