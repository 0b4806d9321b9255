"""Residual blocks, resampling, and the container that hands conditions to its children."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.nn.attention import SpatialTransformer, zero_module
from ldm.nn.norm import GroupNorm32


class Downsample(nn.Module):
    """Halve the resolution by a strided 3x3 convolution, padded by one pixel on every side.

    (B, C, H, W) to (B, C, ceil(H/2), ceil(W/2)). The autoencoder pads asymmetrically instead and has its own.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample x."""
        return self.op(x)


class Upsample(nn.Module):
    """Double the resolution by nearest neighbour, then a 3x3 convolution: (B, C, H, W) to (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample x."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _resampler(resample: str) -> nn.Module:
    if resample == "none":
        return nn.Identity()
    if resample == "up":
        return nn.Upsample(scale_factor=2.0, mode="nearest")
    if resample == "down":
        return nn.AvgPool2d(2)
    raise ValueError(f"got resample {resample!r}, expected 'none', 'up' or 'down'; choose one of them")


class ResBlock(nn.Module):
    """Residual block that takes the time embedding, as a branch that starts at zero.

    x (B, C_in, H, W) and emb (B, emb_dim) give (B, C_out, H', W'), where resample ("none", "up", "down") doubles or
    halves both the branch and the skip. With scale_shift_norm the embedding scales and shifts the second norm,
    otherwise it is added before it. Raises ValueError for channels that do not divide into norm_groups.
    Source: Dhariwal and Nichol 2021, appendix A.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_dim: int,
        dropout: float = 0.0,
        scale_shift_norm: bool = False,
        resample: str = "none",
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        self.scale_shift_norm = scale_shift_norm
        self.resampler = _resampler(resample)
        self.in_layers = nn.Sequential(
            GroupNorm32(in_channels, groups=norm_groups),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        emb_channels = 2 * out_channels if scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, emb_channels))
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels, groups=norm_groups),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Give the block's output for x under the embedding emb."""
        norm, activation, conv = self.in_layers
        h = conv(self.resampler(activation(norm(x))))
        h = self._condition(h, rearrange(self.emb_layers(emb), "b c -> b c 1 1"))
        return self.skip_connection(self.resampler(x)) + h

    def _condition(self, h: Tensor, emb: Tensor) -> Tensor:
        if not self.scale_shift_norm:
            return self.out_layers(h + emb)
        norm, activation, dropout, conv = self.out_layers
        scale, shift = emb.chunk(2, dim=1)
        return conv(dropout(activation(norm(h) * (1 + scale) + shift)))


class TimestepSequential(nn.Sequential):
    """Sequence that gives each child what it takes: residual blocks the embedding, transformers context and mask."""

    def forward(  # type: ignore[override]  # more inputs than a plain sequence has
        self, x: Tensor, emb: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Apply the children to x (B, C, H, W) under emb (B, emb_dim), context (B, L, D) and mask (B, L)."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, mask)
            else:
                x = layer(x)
        return x
