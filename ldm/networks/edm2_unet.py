"""The magnitude-preserving U-Net of EDM2."""

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
from ldm.nn.magnitude_preserving import (
    MPConv,
    MPFourier,
    MPLinear,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize_weights,
    unit_magnitude,
)
from ldm.nn.resample import resampler

RESIDUAL_BALANCE = 0.3
LARGEST_ACTIVATION = 256.0


class EDM2UNet(nn.Module):
    """U-Net without normalisation layers and offsets, in which weights and sums keep activations at magnitude 1.

    Training it needs `after_optimizer_step` called after every optimizer step, and sigma_data of the schedule and
    the latents at 0.5.

    Args:
        in_channels: channels of x and, after them, of `cond.concat`; a channel of ones is added within.
        out_channels: channels of the output.
        model_channels: width of the first level; `channel_mult` holds each level's multiple of it.
        num_res_blocks: blocks a level on the way down; the way up has one more.
        attention_resolutions: downsampling factors, not pixel sizes, of the levels that attend: of 64x64 latents
            16x16 and 8x8 are 4 and 8. The middle always attends.
        num_head_channels: width of an attention head.
        num_classes: embed class ids, int64 `cond.vector` (B,); the id num_classes is "no class".
        dropout: within blocks.
        uncertainty_channels: width of the head that predicts the loss at a noise level; None builds none.
        checkpoint_blocks: recompute every block in the backward pass, to save memory.

    Raises:
        ValueError: an ill-posed geometry; in `forward`, conditions that the network was not built for.

    Source: Karras et al. 2024, configuration G.
    """

    arguments: dict[str, Any]

    @keeps_arguments
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        model_channels: int,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_res_blocks: int = 3,
        attention_resolutions: Sequence[int] = (4, 8),
        num_head_channels: int = 64,
        num_classes: int | None = None,
        dropout: float = 0.0,
        uncertainty_channels: int | None = None,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        widths = [model_channels * mult for mult in channel_mult]
        self.plan = UNetPlan(
            stem=widths[0] if widths else 0,
            widths=widths,
            num_blocks=num_res_blocks,
            attends=attending_levels(len(widths), attention_resolutions),
            only_last_attends=False,
        )
        self.in_channels, self.downsampling_factor = in_channels, self.plan.downsampling_factor
        self.checkpoint_blocks = checkpoint_blocks
        self.accepted = AcceptedConditions(None, num_classes, None)
        self.embedding = _Embedding(widths[0], max(widths), num_classes)
        settings = _BlockSettings(max(widths), num_head_channels, dropout)
        self.stem = MPConv(in_channels + 1, widths[0], 3)
        self.encoder = nn.ModuleList(EncoderBlock(block, settings) for block in self.plan.encoder())
        self.decoder = nn.ModuleList(DecoderBlock(block, settings) for block in self.plan.decoder())
        self.out_conv = MPConv(widths[0], out_channels, 3)
        # One number, but with an axis: FSDP2 spreads no scalars.
        self.out_gain = nn.Parameter(torch.zeros(1))
        self.uncertainty = None if uncertainty_channels is None else _Uncertainty(uncertainty_channels)
        self.after_optimizer_step()

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Map x (B, C, H, W) at network times t (B,) under cond to (B, out_channels, H, W).

        H and W are multiples of 2^(levels - 1). Raises ValueError when cond does not fit the network.
        """
        self.accepted.check(cond)
        x = with_extra_channels(x, cond, in_channels=self.in_channels, multiple_of=self.downsampling_factor)
        emb = self.embedding(t, cond, x.dtype)
        h = self.stem(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        skips = [h]
        for block in self.encoder:
            h = apply_block(block, h, emb, recompute=self.checkpoint_blocks)
            skips.append(h)
        for block, plan in zip(self.decoder, self.plan.decoder(), strict=True):
            if plan.skip_channels:
                h = mp_cat(h, skips.pop())
            h = apply_block(block, h, emb, recompute=self.checkpoint_blocks)
        return self.out_conv(h, self.out_gain)

    @property
    def learns_uncertainty(self) -> bool:
        """Whether training weighs noise levels by `log_variance`."""
        return self.uncertainty is not None

    def log_variance(self, t: Tensor) -> Tensor:
        """u (B,) at network times t (B,): training minimises loss / exp(u) + u (eq. 21).

        Raises:
            ValueError: the network was built without the head.
        """
        if self.uncertainty is None:
            raise ValueError(
                "got a network that predicts no uncertainty, expected one; set uncertainty_channels (128 is published)"
            )
        return self.uncertainty(t)

    def after_optimizer_step(self) -> None:
        """Bring the weights back to magnitude 1 (eq. 66); the training loop calls it after every optimizer step."""
        normalize_weights(self)


@dataclass(frozen=True)
class _BlockSettings:
    emb_dim: int
    num_head_channels: int
    dropout: float


class _Embedding(nn.Module):
    """Network times (B,) and class ids to one embedding (B, emb_dim)."""

    def __init__(self, time_channels: int, emb_dim: int, num_classes: int | None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.fourier = MPFourier(time_channels)
        self.noise = MPLinear(time_channels, emb_dim)
        self.label = None if num_classes is None else MPLinear(num_classes, emb_dim)

    def forward(self, t: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        emb = self.noise(self.fourier(t).to(dtype))
        if self.label is not None:
            assert self.num_classes is not None and cond.vector is not None
            label = self.label(class_vectors(cond.vector, self.num_classes).to(dtype))
            emb = mp_sum(emb, label, balance=0.5)
        return mp_silu(emb)


class _Uncertainty(nn.Module):
    """Network times (B,) to the logarithm of the loss expected there (B,), in float32 also under autocast."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fourier = MPFourier(channels)
        self.linear = MPLinear(channels, 1)

    def forward(self, t: Tensor) -> Tensor:
        levels = self.fourier(t)
        # A product and a sum, which autocast leaves in float32, and not a linear layer, which it would round.
        return (levels * self.linear.acting_weight(1.0, levels.dtype)).sum(1)


class _Residual(nn.Module):
    """The residual branch: (B, in, H, W) under an embedding (B, emb_dim) to (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, settings: _BlockSettings) -> None:
        super().__init__()
        self.conv0 = MPConv(in_channels, out_channels, 3)
        self.modulation = MPLinear(settings.emb_dim, out_channels)
        self.modulation_gain = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout(settings.dropout)
        self.conv1 = MPConv(out_channels, out_channels, 3)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale = 1 + rearrange(self.modulation(emb, self.modulation_gain), "b c -> b c 1 1")
        return self.conv1(self.dropout(mp_silu(self.conv0(mp_silu(x)) * scale)))


class CosineAttention(nn.Module):
    """Attention over pixels with queries, keys and values of magnitude 1, as a magnitude-preserving residual branch.

    (B, C, H, W) to (B, C, H, W). Raises ValueError for channels that do not divide into heads.
    """

    def __init__(self, channels: int, *, num_head_channels: int) -> None:
        super().__init__()
        if num_head_channels < 1 or channels % num_head_channels:
            raise ValueError(
                f"got {channels} channels for heads of {num_head_channels} channels, expected a multiple; "
                "change num_head_channels or model_channels"
            )
        self.num_heads = channels // num_head_channels
        self.qkv = MPConv(channels, 3 * channels, 1)
        self.proj = MPConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the pixels of x."""
        pattern = "b (three n d) h w -> three b n (h w) d"
        q, k, v = unit_magnitude(rearrange(self.qkv(x), pattern, three=3, n=self.num_heads), dim=-1)
        found = F.scaled_dot_product_attention(q, k, v)
        found = rearrange(found, "b n (h w) d -> b (n d) h w", h=x.shape[-2])
        return mp_sum(x, self.proj(found), balance=RESIDUAL_BALANCE)


class EncoderBlock(nn.Module):
    """Block on the way down: resample, project, normalise every pixel, add the residual branch, attend."""

    def __init__(self, plan: BlockPlan, settings: _BlockSettings) -> None:
        super().__init__()
        width = plan.out_channels
        self.resampler = resampler(plan.resample)
        self.skip = nn.Identity() if plan.in_channels == width else MPConv(plan.in_channels, width, 1)
        self.residual = _Residual(width, width, settings)
        self.attention = _attention(plan, settings)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Give the block's output for x (B, C, H, W) under emb (B, emb_dim)."""
        x = unit_magnitude(self.skip(self.resampler(x)), dim=1)
        x = mp_sum(x, self.residual(x, emb), balance=RESIDUAL_BALANCE)
        return self.attention(x).clamp(-LARGEST_ACTIVATION, LARGEST_ACTIVATION)


class DecoderBlock(nn.Module):
    """Block on the way up: resample, add the residual branch to the projected input, attend."""

    def __init__(self, plan: BlockPlan, settings: _BlockSettings) -> None:
        super().__init__()
        width = plan.out_channels
        self.resampler = resampler(plan.resample)
        self.skip = nn.Identity() if plan.in_channels == width else MPConv(plan.in_channels, width, 1)
        self.residual = _Residual(plan.in_channels, width, settings)
        self.attention = _attention(plan, settings)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Give the block's output for x (B, C, H, W) under emb (B, emb_dim)."""
        x = self.resampler(x)
        x = mp_sum(self.skip(x), self.residual(x, emb), balance=RESIDUAL_BALANCE)
        return self.attention(x).clamp(-LARGEST_ACTIVATION, LARGEST_ACTIVATION)


def _attention(plan: BlockPlan, settings: _BlockSettings) -> nn.Module:
    if not plan.attends:
        return nn.Identity()
    return CosineAttention(plan.out_channels, num_head_channels=settings.num_head_channels)
