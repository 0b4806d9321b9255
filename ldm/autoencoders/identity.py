"""The autoencoder that does nothing, for diffusion over pixels."""

import torch
from torch import Tensor

from ldm.autoencoders.autoencoder import Scale
from ldm.autoencoders.gaussian import LOGVAR_RANGE, GaussianAutoencoder


class IdentityAutoencoder(GaussianAutoencoder):
    """Images are their own latents: the mean of the moments is the image and the log-variance is -30.

    Images (B, C, H, W) in [-1, 1] have moments (B, 2C, H, W) and latents (B, C, H, W). Raises ValueError for images
    outside [-1, 1].
    """

    def __init__(self, image_channels: int = 3, *, latent_scale: Scale = 1.0, latent_shift: Scale = 0.0) -> None:
        super().__init__(
            latent_channels=image_channels,
            downsampling_factor=1,
            latent_scale=latent_scale,
            latent_shift=latent_shift,
        )

    def encode(self, images: Tensor) -> Tensor:
        """Give moments (B, 2C, H, W) of images (B, C, H, W)."""
        self.check_images(images)
        return torch.cat([images, torch.full_like(images, LOGVAR_RANGE[0])], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Give the images (B, C, H, W) that scaled latents (B, C, H, W) are."""
        return self.from_latents(latents)
