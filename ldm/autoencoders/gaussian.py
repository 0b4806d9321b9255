"""What every autoencoder with a Gaussian posterior shares: moments and the posterior."""

from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor

from ldm.autoencoders.autoencoder import Autoencoder, Scale

LOGVAR_RANGE = (-30.0, 20.0)


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


class GaussianAutoencoder(Autoencoder):
    """An autoencoder whose moments (B, 2C, h, w) are the mean and log-variance of its latents.

    Subclasses give `encode` and `decode`. Raises ValueError for a scale that is not positive.
    """

    regularization = "kl"
    loss_unit = "image"

    def __init__(
        self, *, latent_channels: int, downsampling_factor: int, latent_scale: Scale = 1.0, latent_shift: Scale = 0.0
    ) -> None:
        super().__init__(
            latent_channels=latent_channels,
            moment_channels=2 * latent_channels,
            downsampling_factor=downsampling_factor,
            latent_scale=latent_scale,
            latent_shift=latent_shift,
        )

    def posterior(self, moments: Tensor) -> DiagonalGaussian:
        """The distribution of unscaled latents that moments (B, 2C, h, w) stand for."""
        return DiagonalGaussian.from_moments(moments)

    def to_latents(self, moments: Tensor, *, noise: Tensor | None) -> Tensor:
        """Scaled latents (B, C, h, w): a sample by standard normal noise (B, C, h, w), or the mean for None."""
        posterior = self.posterior(moments)
        return self.scaled(posterior.mode() if noise is None else posterior.sample(noise))

    def mean_and_std(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) of the posterior."""
        posterior = self.posterior(moments)
        return posterior.mean, posterior.std

    def forward(self, images: Tensor, *, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(Reconstructions (B, 3, H, W) through a sample of the posterior, mean KL divergence in nats an image)."""
        moments = self.encode(images)
        reconstructions = self.decode(self.to_latents(moments, noise=noise))
        return reconstructions, self.posterior(moments).kl().mean()
