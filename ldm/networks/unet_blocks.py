"""What the U-Net is put together from: which layers stand on which level, and with which settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from ldm.nn import (
    AttentionBlock,
    Downsample,
    GroupNorm32,
    ResBlock,
    SpatialTransformer,
    TimestepSequential,
    Upsample,
    zero_module,
)

ValueT = TypeVar("ValueT", int, bool)


def per_level(name: str, value: ValueT | Sequence[ValueT], levels: int) -> list[ValueT]:
    """Repeat one value for every level, or check that a sequence has one for each; ValueError when it has not."""
    if not isinstance(value, Sequence):
        return [value] * levels
    if len(value) != levels:
        raise ValueError(
            f"got {name} of length {len(value)}, expected {levels}, one for each entry of channel_mult; "
            "give one value a level"
        )
    return list(value)


@dataclass(frozen=True, kw_only=True)
class AttentionLayers:
    """How the attention of each level is built. Raises ValueError for settings that contradict each other."""

    context_dim: int | None
    num_heads: int | None
    num_head_channels: int | None
    depths: list[int]
    without_self: list[bool]
    linear_projection: bool
    new_order: bool
    norm_groups: int

    def __post_init__(self) -> None:
        if (self.num_heads is None) == (self.num_head_channels is None):
            raise ValueError(
                f"got num_heads {self.num_heads} and num_head_channels {self.num_head_channels}, "
                "expected exactly one; set the other to null"
            )
        if min(self.depths, default=1) < 1:
            raise ValueError(
                f"got transformer_depth {self.depths}, expected at least 1 on every level; "
                "take a level out of attention_resolutions instead"
            )
        if self.context_dim is not None and self.new_order:
            raise ValueError(
                "got new_attention_order together with context_dim, expected one of them; the order is about "
                "attention over pixels alone"
            )
        transformer_only = max(self.depths, default=1) > 1 or self.linear_projection or any(self.without_self)
        if self.context_dim is None and transformer_only:
            raise ValueError(
                "got transformer_depth, use_linear_projection or disable_self_attention without context_dim, expected "
                "their defaults; set context_dim to use spatial transformers"
            )

    def on_level(self, level: int, channels: int) -> nn.Module:
        """The attention of a level."""
        return self._layer(level, channels, self_attention=not self.without_self[level])

    def in_middle(self, channels: int) -> nn.Module:
        """The attention of the middle: as deep as the last level's, and always with self-attention."""
        return self._layer(-1, channels, self_attention=True)

    def _layer(self, level: int, channels: int, *, self_attention: bool) -> nn.Module:
        num_heads = self._heads(channels)
        if self.context_dim is None:
            return AttentionBlock(channels, num_heads=num_heads, new_order=self.new_order, norm_groups=self.norm_groups)
        return SpatialTransformer(
            channels,
            num_heads=num_heads,
            context_dim=self.context_dim,
            depth=self.depths[level],
            linear_projection=self.linear_projection,
            self_attention=self_attention,
            norm_groups=self.norm_groups,
        )

    def _heads(self, channels: int) -> int:
        if self.num_head_channels is None:
            assert self.num_heads is not None
            return self.num_heads
        if self.num_head_channels < 1 or channels % self.num_head_channels:
            raise ValueError(
                f"got {channels} channels for heads of {self.num_head_channels} channels, expected a multiple; "
                "change num_head_channels or model_channels"
            )
        return channels // self.num_head_channels


@dataclass(frozen=True, kw_only=True)
class UNetLayers:
    """Builds the parts of a U-Net; level 0 has the full resolution and widths are channels by level."""

    widths: list[int]
    num_res_blocks: list[int]
    attends: list[bool]
    attention: AttentionLayers
    emb_dim: int
    dropout: float
    scale_shift_norm: bool
    resblock_updown: bool
    norm_groups: int

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("got an empty channel_mult, expected at least one level; give it an entry")
        if min(self.num_res_blocks) < 1:
            raise ValueError(f"got num_res_blocks {self.num_res_blocks}, expected at least 1 on every level; raise it")

    def encoder(self, in_channels: int, channels: int) -> tuple[nn.ModuleList, list[int]]:
        """The blocks on the way down, and the channels that each of them leaves to a skip connection."""
        blocks = [TimestepSequential(nn.Conv2d(in_channels, channels, 3, padding=1))]
        skips = [channels]
        for level, width in enumerate(self.widths):
            for _ in range(self.num_res_blocks[level]):
                blocks.append(TimestepSequential(self._res(channels, width), *self._attention(level)))
                channels = width
                skips.append(channels)
            if level < len(self.widths) - 1:
                blocks.append(TimestepSequential(self._resample(channels, "down")))
                skips.append(channels)
        return nn.ModuleList(blocks), skips

    def middle(self) -> TimestepSequential:
        """The blocks at the lowest resolution."""
        width = self.widths[-1]
        return TimestepSequential(self._res(width, width), self.attention.in_middle(width), self._res(width, width))

    def decoder(self, skips: Sequence[int]) -> nn.ModuleList:
        """The blocks on the way up: one more a level than on the way down, each taking the last skip left."""
        blocks, channels, waiting = [], self.widths[-1], list(skips)
        for level in reversed(range(len(self.widths))):
            for index in range(self.num_res_blocks[level] + 1):
                layers = [self._res(channels + waiting.pop(), self.widths[level]), *self._attention(level)]
                channels = self.widths[level]
                if level > 0 and index == self.num_res_blocks[level]:
                    layers.append(self._resample(channels, "up"))
                blocks.append(TimestepSequential(*layers))
        return nn.ModuleList(blocks)

    def head(self, out_channels: int) -> nn.Sequential:
        """Norm, activation and the last convolution, which starts at zero."""
        width = self.widths[0]
        conv = zero_module(nn.Conv2d(width, out_channels, 3, padding=1))
        return nn.Sequential(GroupNorm32(width, groups=self.norm_groups), nn.SiLU(), conv)

    def _res(self, channels: int, width: int, *, resample: str = "none") -> ResBlock:
        return ResBlock(
            channels,
            width,
            emb_dim=self.emb_dim,
            dropout=self.dropout,
            scale_shift_norm=self.scale_shift_norm,
            resample=resample,
            norm_groups=self.norm_groups,
        )

    def _attention(self, level: int) -> list[nn.Module]:
        return [self.attention.on_level(level, self.widths[level])] if self.attends[level] else []

    def _resample(self, channels: int, direction: str) -> nn.Module:
        if self.resblock_updown:
            return self._res(channels, channels, resample=direction)
        return Downsample(channels) if direction == "down" else Upsample(channels)
