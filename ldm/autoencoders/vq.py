"""The vector-quantised convolutional autoencoder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.autoencoders.autoencoder import Autoencoder, Scale
from ldm.autoencoders.blocks import AutoencoderGeometry
from ldm.autoencoders.decoder import Decoder
from ldm.autoencoders.encoder import Encoder
from ldm.autoencoders.quantizer import VectorQuantizer
from ldm.nn.arguments import keeps_arguments


class VQAutoencoder(Autoencoder):
    """Autoencoder with a learned codebook, downsampling by 2^(levels - 1).

    Moments are the encoder's latents (B, C, h, w) *before* quantisation, and so are the latents that diffusion works
    on; `decode` quantises first, "the quantization layer absorbed by the decoder". Without the two scale buffers its
    parameters have the names and shapes of the published first stages. The geometry is that of `AutoencoderGeometry`.

    Args:
        image_channels: channels of images.
        latent_channels: channels C of latents, and width of the codebook's entries.
        num_codes: entries in the codebook.
        codebook_weight, commitment_weight: as in `VectorQuantizer`, by default as the published models were trained.
        latent_scale: latents = (value - latent_shift) * latent_scale.

    Raises:
        ValueError: an ill-posed geometry; in `encode`, images outside [-1, 1] or of a size that does not divide.

    Source: van den Oord et al. 2017; Esser et al. 2021; Rombach et al. 2022, section 3.1.
    """

    regularization = "quantization"
    loss_unit = "value"
    arguments: dict[str, Any]

    @keeps_arguments
    def __init__(
        self,
        image_channels: int = 3,
        latent_channels: int = 3,
        *,
        num_codes: int = 8192,
        base_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (),
        resolution: int | None = None,
        attention_type: str = "vanilla",
        dropout: float = 0.0,
        norm_groups: int = 32,
        codebook_weight: float = 0.25,
        commitment_weight: float = 1.0,
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
            moment_channels=latent_channels,
            downsampling_factor=geometry.downsampling_factor,
            latent_scale=latent_scale,
            latent_shift=latent_shift,
        )
        self.encoder = Encoder(image_channels, latent_channels, geometry=geometry)
        self.decoder = Decoder(latent_channels, image_channels, geometry=geometry)
        self.quantize = VectorQuantizer(
            num_codes, latent_channels, codebook_weight=codebook_weight, commitment_weight=commitment_weight
        )
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last layer, where adversarial training balances its losses."""
        return self.decoder.conv_out.weight  # type: ignore[return-value]

    def encode(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to unscaled latents (B, C, h, w) that are not quantised yet."""
        self.check_images(images)
        return self.quant_conv(self.encoder(images))

    def to_latents(self, moments: Tensor, *, noise: Tensor | None) -> Tensor:
        """Scaled latents (B, C, h, w), the same whatever the noise: this encoder is certain of what it says."""
        return self.scaled(moments)

    def decode(self, latents: Tensor) -> Tensor:
        """Quantise scaled latents (B, C, h, w) and map them to images (B, 3, H, W), about in [-1, 1]."""
        return self.decode_quantized(self.quantize(self.from_latents(latents)).latents)

    def decode_quantized(self, entries: Tensor) -> Tensor:
        """Map unscaled codebook entries (B, C, h, w), as `quantize.entries(codes)` gives them, to images."""
        return self.decoder(self.post_quant_conv(entries))

    def codes(self, moments: Tensor) -> Tensor:
        """Codebook places (B, h, w) int64 of moments (B, C, h, w)."""
        return self.quantize.codes(moments)

    def mean_and_std(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """The moments themselves, and zero."""
        return moments, torch.zeros_like(moments)

    def forward(self, images: Tensor, *, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(Reconstructions (B, 3, H, W), codebook and commitment loss, a mean over values); noise does not enter."""
        quantized = self.quantize(self.encode(images))
        return self.decode_quantized(quantized.latents), quantized.loss
