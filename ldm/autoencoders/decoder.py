"""The convolutional decoder of the published autoencoders."""

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoders.blocks import AutoencoderGeometry, autoencoder_norm


class Decoder(nn.Module):
    """Decoder from unscaled latents (B, in_channels, h, w) to images (B, out_channels, f h, f w), f = 2^(levels - 1).

    `up.0` holds the highest resolution and runs last. Raises ValueError for channels that do not divide into the norm
    groups. Source: Esser et al. 2021.
    """

    def __init__(self, in_channels: int, out_channels: int, *, geometry: AutoencoderGeometry) -> None:
        super().__init__()
        widths = geometry.widths
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = geometry.middle()
        self.up = nn.ModuleList(geometry.up(index) for index in range(len(widths)))
        self.norm_out = autoencoder_norm(widths[0], groups=geometry.norm_groups)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents."""
        h = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
