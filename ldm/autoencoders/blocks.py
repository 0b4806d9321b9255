"""Blocks of the encoder and decoder, with the parameter names of the published autoencoders."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.nn import GroupNorm32, Upsample

# Unlike the U-Net's 1e-5.
NORM_EPS = 1e-6


def autoencoder_norm(channels: int, *, groups: int) -> GroupNorm32:
    """The group normalisation of the published autoencoders."""
    return GroupNorm32(channels, groups=groups, eps=NORM_EPS)


class ResnetBlock(nn.Module):
    """Residual block without time: (B, C_in, H, W) to (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, *, dropout: float = 0.0, norm_groups: int = 32) -> None:
        super().__init__()
        self.norm1 = autoencoder_norm(in_channels, groups=norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = autoencoder_norm(out_channels, groups=norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # Absent, not an identity, where channels stay: the published weights have the key only where they change.
        self.nin_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Give x (or its projection) plus the branch."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class PixelAttention(nn.Module):
    """Single-head self-attention over pixels with 1x1 convolutions, added to x: (B, C, H, W) to (B, C, H, W)."""

    def __init__(self, channels: int, *, norm_groups: int = 32) -> None:
        super().__init__()
        self.norm = autoencoder_norm(channels, groups=norm_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Give x plus the attention over its pixels."""
        h = self.norm(x)
        q, k, v = (rearrange(conv(h), "b c h w -> b 1 (h w) c") for conv in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[-2]))


class AsymmetricDownsample(nn.Module):
    """Halve the resolution by a strided 3x3 convolution padded on the right and bottom alone.

    (B, C, H, W) to (B, C, H/2, W/2). Padding every side instead would shift the features by half a pixel.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample x."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class MiddleBlock(nn.Module):
    """Residual block, attention (or none), residual block at the lowest resolution."""

    def __init__(self, channels: int, *, attention_type: str, dropout: float, norm_groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout=dropout, norm_groups=norm_groups)
        self.attn_1 = _middle_attention(channels, attention_type, norm_groups)
        self.block_2 = ResnetBlock(channels, channels, dropout=dropout, norm_groups=norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


def _middle_attention(channels: int, attention_type: str, norm_groups: int) -> nn.Module:
    if attention_type == "vanilla":
        return PixelAttention(channels, norm_groups=norm_groups)
    if attention_type == "none":
        return nn.Identity()
    raise ValueError(f"got attention_type {attention_type!r}, expected 'vanilla' or 'none'; choose one of them")


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where the level attends, then the way down or up.

    (B, C_in, H, W) to (B, C_out, H', W'), where downsample halves and upsample doubles the size.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_blocks: int,
        attends: bool,
        dropout: float,
        norm_groups: int,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * num_blocks]
        self.block = nn.ModuleList(
            ResnetBlock(*pair, dropout=dropout, norm_groups=norm_groups) for pair in pairwise(widths)
        )
        num_attentions = num_blocks if attends else 0
        self.attn = nn.ModuleList(PixelAttention(out_channels, norm_groups=norm_groups) for _ in range(num_attentions))
        self.downsample = downsample
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks in turn, then resample."""
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn) > 0:
                x = self.attn[index](x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x if self.upsample is None else self.upsample(x)


@dataclass(frozen=True, kw_only=True)
class AutoencoderGeometry:
    """What encoder and decoder have in common.

    Args:
        base_channels: width of the first level; `channel_mult` holds each level's multiple of it.
        num_res_blocks: residual blocks a level on the way down; the way up has one more.
        attn_resolutions: sizes in pixels of the feature maps that attend, for images of `resolution`.
        resolution: size of the training images, needed by `attn_resolutions` alone.
        attention_type: of the middle, "vanilla" or "none".
        dropout: within residual blocks.
        norm_groups: of every normalisation.

    Raises:
        ValueError: an empty channel_mult, or attention sizes that no level has.
    """

    base_channels: int
    channel_mult: Sequence[int]
    num_res_blocks: int
    attn_resolutions: Sequence[int] = ()
    resolution: int | None = None
    attention_type: str = "vanilla"
    dropout: float = 0.0
    norm_groups: int = 32

    def __post_init__(self) -> None:
        if not self.channel_mult:
            raise ValueError("got an empty channel_mult, expected at least one level; give it an entry")
        if self.num_res_blocks < 1:
            raise ValueError(f"got num_res_blocks {self.num_res_blocks}, expected at least 1; raise it")
        if self.resolution is not None and not self.attn_resolutions:
            raise ValueError(
                f"got resolution {self.resolution} without attn_resolutions, expected neither or both; it only "
                "places attention"
            )
        if self.attn_resolutions and self.attention_type == "none":
            raise ValueError(
                f"got attn_resolutions {list(self.attn_resolutions)} with attention_type 'none', expected none; "
                "empty the list"
            )
        if not set(self.attn_resolutions) <= set(self.sizes):
            raise ValueError(
                f"got attn_resolutions {list(self.attn_resolutions)} for feature maps of {self.sizes}, expected some "
                "of these; set resolution to the training image size"
            )

    @property
    def downsampling_factor(self) -> int:
        """Ratio of image size to latent size."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels by level, the highest resolution first."""
        return [self.base_channels * mult for mult in self.channel_mult]

    @property
    def sizes(self) -> list[int]:
        """Feature map sizes by level for images of `resolution`; empty without one."""
        return [] if self.resolution is None else [self.resolution // 2**level for level in range(len(self.widths))]

    def down(self, index: int) -> Level:
        """The level of the encoder at widths[index], with the way down except at the last."""
        last = index == len(self.widths) - 1
        return Level(
            self.base_channels if index == 0 else self.widths[index - 1],
            self.widths[index],
            num_blocks=self.num_res_blocks,
            attends=self._attends(index),
            dropout=self.dropout,
            norm_groups=self.norm_groups,
            downsample=None if last else AsymmetricDownsample(self.widths[index]),
        )

    def up(self, index: int) -> Level:
        """The level of the decoder at widths[index], with one block more and the way up except at the first."""
        last = index == len(self.widths) - 1
        return Level(
            self.widths[index] if last else self.widths[index + 1],
            self.widths[index],
            num_blocks=self.num_res_blocks + 1,
            attends=self._attends(index),
            dropout=self.dropout,
            norm_groups=self.norm_groups,
            upsample=None if index == 0 else Upsample(self.widths[index]),
        )

    def middle(self) -> MiddleBlock:
        """The blocks of the lowest resolution."""
        return MiddleBlock(
            self.widths[-1],
            attention_type=self.attention_type,
            dropout=self.dropout,
            norm_groups=self.norm_groups,
        )

    def _attends(self, index: int) -> bool:
        return bool(self.sizes) and self.sizes[index] in self.attn_resolutions
