"""The order of blocks that the U-Nets of Karras et al. 2022 and 2024 share, as data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Resample = Literal["none", "down", "up"]


@dataclass(frozen=True)
class BlockPlan:
    """One block: its channels, whether it resamples, attends, and (on the way up) takes a skip connection."""

    in_channels: int
    out_channels: int
    resample: Resample = "none"
    attends: bool = False
    skip_channels: int = 0


@dataclass(frozen=True, kw_only=True)
class UNetPlan:
    """Which blocks a U-Net has, the first convolution apart.

    Args:
        stem: channels that the first convolution gives.
        widths: channels of each level; level 0 has the full resolution.
        num_blocks: blocks a level on the way down; the way up has one more.
        attends: whether each level attends.
        only_last_attends: on the way up, of the blocks of an attending level the last alone attends.

    Raises:
        ValueError: no levels, or a level without blocks.
    """

    stem: int
    widths: Sequence[int]
    num_blocks: int
    attends: Sequence[bool]
    only_last_attends: bool

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("got an empty channel_mult, expected at least one level; give it an entry")
        if self.num_blocks < 1:
            raise ValueError(f"got num_res_blocks {self.num_blocks}, expected at least 1; raise it")

    @property
    def downsampling_factor(self) -> int:
        """How much smaller the last level is."""
        return 2 ** (len(self.widths) - 1)

    def encoder(self) -> list[BlockPlan]:
        """The blocks on the way down: a level opens with one that halves the resolution."""
        blocks, channels = [], self.stem
        for level, (width, attends) in enumerate(zip(self.widths, self.attends, strict=True)):
            if level > 0:
                blocks.append(BlockPlan(channels, channels, resample="down"))
            for _ in range(self.num_blocks):
                blocks.append(BlockPlan(channels, width, attends=attends))
                channels = width
        return blocks

    def decoder(self) -> list[BlockPlan]:
        """The blocks on the way up: two in the middle, then a level at a time, opening with one that doubles."""
        channels = self.widths[-1]
        blocks = [BlockPlan(channels, channels, attends=True), BlockPlan(channels, channels)]
        skips = [self.stem, *(block.out_channels for block in self.encoder())]
        for level in reversed(range(len(self.widths))):
            if level < len(self.widths) - 1:
                blocks.append(BlockPlan(channels, channels, resample="up"))
            for index in range(self.num_blocks + 1):
                attends = self.attends[level] and (index == self.num_blocks or not self.only_last_attends)
                skip = skips.pop()
                blocks.append(BlockPlan(channels + skip, self.widths[level], attends=attends, skip_channels=skip))
                channels = self.widths[level]
        return blocks


def attending_levels(levels: int, attention_resolutions: Sequence[int]) -> list[bool]:
    """Whether each level attends, from the downsampling factors of those that do.

    Raises:
        ValueError: a factor that no level has.
    """
    factors = [2**level for level in range(levels)]
    if unknown := sorted(set(attention_resolutions) - set(factors)):
        raise ValueError(
            f"got attention_resolutions with {unknown}, expected downsampling factors among {factors}; pixel sizes "
            "are divided out of the image size first"
        )
    return [factor in attention_resolutions for factor in factors]
