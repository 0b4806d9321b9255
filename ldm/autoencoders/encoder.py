"""The convolutional encoder of the published autoencoders."""

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoders.blocks import AutoencoderGeometry, autoencoder_norm


class Encoder(nn.Module):
    """Encoder from images (B, in_channels, H, W) to features (B, out_channels, H/f, W/f), f = 2^(levels - 1).

    Raises ValueError for channels that do not divide into the norm groups. Source: Esser et al. 2021.
    """

    def __init__(self, in_channels: int, out_channels: int, *, geometry: AutoencoderGeometry) -> None:
        super().__init__()
        width = geometry.widths[-1]
        self.conv_in = nn.Conv2d(in_channels, geometry.base_channels, 3, padding=1)
        self.down = nn.ModuleList(geometry.down(index) for index in range(len(geometry.widths)))
        self.mid = geometry.middle()
        self.norm_out = autoencoder_norm(width, groups=geometry.norm_groups)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images."""
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))
