"""The U-Nets of EDM for small images: DDPM++ and NCSN++."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.diffusion.conditioning import Conditioning
from ldm.networks.conditions import AcceptedConditions, class_vectors, with_extra_channels
from ldm.networks.edm_layout import BlockPlan, UNetPlan, attending_levels
from ldm.networks.recompute import apply_block
from ldm.nn.arguments import keeps_arguments
from ldm.nn.noise_level import FourierLevels, SinusoidalLevels
from ldm.nn.norm import GroupNorm32
from ldm.nn.resample import FilteredDownsample, border, resampler

HALF = 0.5**0.5


class EDMUNet(nn.Module):
    """Convolutional U-Net whose branches are summed at equal magnitude, conditioned on noise level and class.

    DDPM++ is embedding "sinusoidal", filter [1, 1] and no pyramid; NCSN++ is embedding "fourier" of twice the width,
    filter [1, 3, 3, 1] and the pyramid.

    Args:
        in_channels: channels of x and, after them, of `cond.concat`.
        out_channels: channels of the output.
        model_channels: width of the first convolution; `channel_mult` holds each level's multiple of it.
        num_res_blocks: blocks a level on the way down; the way up has one more.
        attention_resolutions: downsampling factors, not pixel sizes, of the levels that attend, with one head: of
            32x32 images 16x16 is 2. The middle always attends.
        embedding: "sinusoidal" or "fourier", of the network time; `time_channels` is its width.
        resample_filter: one axis of the filter of down- and upsampling.
        input_pyramid: add the downsampled input on every level on the way down.
        num_classes: embed class ids, int64 `cond.vector` (B,); the id num_classes is "no class".
        augment_dim: take labels of non-leaking augmentation as `cond.context` (B, 1, augment_dim), zeros or no
            context meaning that the image is as it was (Karras et al. 2022, appendix F.2).
        dropout: within blocks.
        checkpoint_blocks: recompute every block in the backward pass, to save memory.

    Raises:
        ValueError: an ill-posed geometry; in `forward`, conditions that the network was not built for.

    Source: Song et al. 2021; Karras et al. 2022, table 7.
    """

    arguments: dict[str, Any]

    @keeps_arguments
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        model_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        embedding: str,
        time_channels: int,
        resample_filter: Sequence[float] = (1, 1),
        input_pyramid: bool = False,
        num_classes: int | None = None,
        augment_dim: int | None = None,
        dropout: float = 0.0,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        plan = UNetPlan(
            stem=model_channels,
            widths=[model_channels * mult for mult in channel_mult],
            num_blocks=num_res_blocks,
            attends=attending_levels(len(channel_mult), attention_resolutions),
            only_last_attends=True,
        )
        settings = _BlockSettings(4 * model_channels, resample_filter, dropout)
        self.plan, self.downsampling_factor = plan, plan.downsampling_factor
        self.in_channels = in_channels
        self.checkpoint_blocks = checkpoint_blocks
        self.accepted = AcceptedConditions(None, num_classes, None)
        self.accepted_augmented = AcceptedConditions(augment_dim, num_classes, None)
        self.embedding = NoiseConditions(
            time_channels, 4 * model_channels, embedding=embedding, num_classes=num_classes, augment_dim=augment_dim
        )
        self.stem = nn.Conv2d(in_channels, model_channels, 3, padding=1)
        self.encoder = nn.ModuleList(EDMBlock(block, settings) for block in plan.encoder())
        self.pyramid = _pyramid(in_channels, plan, resample_filter) if input_pyramid else None
        self.decoder = nn.ModuleList(EDMBlock(block, settings) for block in plan.decoder())
        self.out_norm = _norm(plan.widths[0])
        self.out_conv = nn.Conv2d(plan.widths[0], out_channels, 3, padding=1)
        self._initialize()

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Map x (B, C, H, W) at network times t (B,) under cond to (B, out_channels, H, W).

        H and W are multiples of 2^(levels - 1). Raises ValueError when cond does not fit the network.
        """
        (self.accepted if cond.context is None else self.accepted_augmented).check(cond)
        x = with_extra_channels(x, cond, in_channels=self.in_channels, multiple_of=self.downsampling_factor)
        emb = self.embedding(t, cond, x.dtype)
        h, skips = self._encoded(x, emb)
        for block, plan in zip(self.decoder, self.plan.decoder(), strict=True):
            if plan.skip_channels:
                h = torch.cat([h, skips.pop()], dim=1)
            h = apply_block(block, h, emb, recompute=self.checkpoint_blocks)
        return self.out_conv(F.silu(self.out_norm(h)))

    def _encoded(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        h = self.stem(x)
        skips = [h]
        steps = iter(self.pyramid) if self.pyramid is not None else None
        image = x
        for block, plan in zip(self.encoder, self.plan.encoder(), strict=True):
            h = apply_block(block, h, emb, recompute=self.checkpoint_blocks)
            if steps is not None and plan.resample == "down":
                h = image = (h + next(steps)(image)) * HALF
            skips.append(h)
        return h, skips

    def _initialize(self) -> None:
        """Xavier-uniform weights and no offsets; what closes a branch, and the output, are tiny (1e-5)."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            closes = name == "out_conv" or name.endswith((".conv1", ".attention.proj"))
            gain = 1e-5 if closes else 0.2**0.5 if name.endswith(".attention.qkv") else 1.0
            nn.init.xavier_uniform_(module.weight, gain=gain)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class NoiseConditions(nn.Module):
    """Network times (B,), classes and augmentation labels to one embedding (B, emb_dim).

    Raises ValueError for an embedding other than "sinusoidal" or "fourier".
    """

    def __init__(
        self, time_channels: int, emb_dim: int, *, embedding: str, num_classes: int | None, augment_dim: int | None
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.level = _level_embedding(embedding, time_channels)
        self.label = None if num_classes is None else nn.Linear(num_classes, time_channels)
        self.augment = None if augment_dim is None else nn.Linear(augment_dim, time_channels, bias=False)
        self.layer0 = nn.Linear(time_channels, emb_dim)
        self.layer1 = nn.Linear(emb_dim, emb_dim)

    def forward(self, t: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        """Embed them; the layers compute in the given dtype."""
        emb = self.level(t).to(dtype)
        if self.label is not None:
            assert self.num_classes is not None and cond.vector is not None
            emb = emb + self.label(class_vectors(cond.vector, self.num_classes).to(dtype))
        if self.augment is not None and cond.context is not None:
            emb = emb + self.augment(cond.context[:, 0].to(dtype))
        return F.silu(self.layer1(F.silu(self.layer0(emb))))


@dataclass(frozen=True)
class _BlockSettings:
    emb_dim: int
    taps: Sequence[float]
    dropout: float


class EDMBlock(nn.Module):
    """Residual block under an embedding (B, emb_dim), with attention over pixels where the plan says so."""

    def __init__(self, plan: BlockPlan, settings: _BlockSettings) -> None:
        super().__init__()
        width = plan.out_channels
        self.resampler = resampler(plan.resample, settings.taps)
        self.norm0 = _norm(plan.in_channels)
        self.conv0 = nn.Conv2d(plan.in_channels, width, 3, padding=1)
        self.affine = nn.Linear(settings.emb_dim, width)
        self.norm1 = _norm(width)
        self.dropout = nn.Dropout(settings.dropout)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        same = plan.in_channels == width and plan.resample == "none"
        self.skip = nn.Identity() if same else nn.Conv2d(plan.in_channels, width, 1)
        self.attention = PixelAttention(width) if plan.attends else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Give the block's output for x (B, C, H, W)."""
        h = self.conv0(self.resampler(F.silu(self.norm0(x))))
        h = h + rearrange(self.affine(emb), "b c -> b c 1 1")
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        return self.attention((self.skip(self.resampler(x)) + h) * HALF)


class PixelAttention(nn.Module):
    """Attention with one head over pixels, summed with what came in at equal magnitude: (B, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the pixels of x."""
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three c) h w -> three b 1 (h w) c", three=3)
        found = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        return (x + self.proj(rearrange(found, "b 1 (h w) c -> b c h w", h=x.shape[-2]))) * HALF


def _pyramid(in_channels: int, plan: UNetPlan, taps: Sequence[float]) -> nn.ModuleList:
    """One step of the input pyramid for each block that halves the resolution: convolve, then filter."""
    steps, channels = [], in_channels
    for block in plan.encoder():
        if block.resample == "down":
            # Padded for both at once, so that the filter sees convolved pixels beyond the border and not zeros.
            conv = nn.Conv2d(channels, block.out_channels, 3, padding=1 + border(taps))
            steps.append(nn.Sequential(conv, FilteredDownsample(taps, padded=True)))
            channels = block.out_channels
    return nn.ModuleList(steps)


def _level_embedding(embedding: str, dim: int) -> nn.Module:
    if embedding == "sinusoidal":
        return SinusoidalLevels(dim)
    if embedding == "fourier":
        return FourierLevels(dim)
    raise ValueError(f"got embedding {embedding!r}, expected 'sinusoidal' or 'fourier'; choose one of them")


def _norm(channels: int) -> GroupNorm32:
    """At least four channels a group, and at most 32 groups."""
    return GroupNorm32(channels, groups=max(1, min(32, channels // 4)), eps=1e-6)
