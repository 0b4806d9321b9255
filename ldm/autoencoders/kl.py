"""The KL-regularised convolutional autoencoder."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ldm.autoencoders.autoencoder import Scale
from ldm.autoencoders.blocks import AutoencoderGeometry
from ldm.autoencoders.decoder import Decoder
from ldm.autoencoders.encoder import Encoder
from ldm.autoencoders.gaussian import GaussianAutoencoder
from ldm.nn.arguments import keeps_arguments


class KLAutoencoder(GaussianAutoencoder):
    """Autoencoder with a Gaussian posterior, downsampling by 2^(levels - 1).

    Without the two scale buffers its parameters have the names and shapes of the published first stages. The geometry
    is that of `AutoencoderGeometry`.

    Args:
        image_channels: channels of images.
        latent_channels: channels C of latents; moments have 2C.
        latent_scale: latents = (sample - latent_shift) * latent_scale.

    Raises:
        ValueError: an ill-posed geometry; in `encode`, images outside [-1, 1] or of a size that does not divide.

    Source: Rombach et al. 2022, section 3.1.
    """

    arguments: dict[str, Any]

    @keeps_arguments
    def __init__(
        self,
        image_channels: int = 3,
        latent_channels: int = 4,
        *,
        base_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (),
        resolution: int | None = None,
        attention_type: str = "vanilla",
        dropout: float = 0.0,
        norm_groups: int = 32,
        latent_scale: Scale = 1.0,
        latent_shift: Scale = 0.0,
    ) -> None:
        geometry = AutoencoderGeometry(
            base_channels=base_channels,
            channel_mult=channel_mult,
            num_res_blocks=num_res_blocks,
            attn_resolutions=attn_resolutions,
            resolution=resolution,
            attention_type=attention_type,
            dropout=dropout,
            norm_groups=norm_groups,
        )
        super().__init__(
            latent_channels=latent_channels,
            downsampling_factor=geometry.downsampling_factor,
            latent_scale=latent_scale,
            latent_shift=latent_shift,
        )
        self.encoder = Encoder(image_channels, 2 * latent_channels, geometry=geometry)
        self.decoder = Decoder(latent_channels, image_channels, geometry=geometry)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last layer, where adversarial training balances its losses."""
        return self.decoder.conv_out.weight  # type: ignore[return-value]

    def encode(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to unscaled moments (B, 2C, h, w), the mean before the log-variance."""
        self.check_images(images)
        return self.quant_conv(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Map scaled latents (B, C, h, w) to images (B, 3, H, W), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(self.from_latents(latents)))
