"""The U-Net of latent diffusion, in the geometry and with the parameter names of the published weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.diffusion.conditioning import Conditioning
from ldm.networks.conditions import AcceptedConditions, with_extra_channels
from ldm.networks.unet_blocks import AttentionLayers, UNetLayers, per_level
from ldm.nn import timestep_embedding
from ldm.nn.arguments import keeps_arguments


class UNet(nn.Module):
    """Convolutional U-Net with attention, conditioned on time, a context, a vector or class, and extra channels.

    Args:
        in_channels: channels of x and, after them, of `cond.concat`.
        out_channels: channels of the output.
        model_channels: `channel_mult` holds each level's width as a multiple of it; 0.5 is half (ADM at 512x512).
            It is the width of the time embedding too.
        stem_channels: width of the first convolution; None is model_channels.
        num_res_blocks: residual blocks a level on the way down (or one number a level); the way up has one more.
        attention_resolutions: downsampling factors, not pixel sizes, of the levels that attend: 2 is half resolution.
            The middle always attends.
        num_heads: attention heads; or instead `num_head_channels`, the width of each.
        context_dim: width D of `cond.context` (B, L, D), which spatial transformers look at under `cond.mask` (B, L);
            every row of the mask must show a token. None builds attention over pixels alone.
        transformer_depth: blocks in each spatial transformer (or one number a level); the middle has the last level's.
        use_linear_projection: linear layers, not 1x1 convolutions, into and out of spatial transformers.
        disable_self_attention: for each level, whether spatial transformers look at the context twice instead.
        new_attention_order: layout of the qkv weights of attention over pixels, see `AttentionBlock`.
        use_scale_shift_norm: the embedding scales and shifts the second norm of residual blocks.
        resblock_updown: resample in residual blocks.
        num_classes: embed class ids, int64 `cond.vector` (B,).
        vector_dim: width of a real `cond.vector` (B, vector_dim), taken in by two layers (SDXL).
        dropout: within residual blocks.
        norm_groups: of every group normalisation.
        checkpoint_blocks: recompute every block in the backward pass, to save memory.

    Raises:
        ValueError: an ill-posed geometry; in `forward`, conditions that the network was not built for.

    Source: Rombach et al. 2022; Dhariwal and Nichol 2021; Podell et al. 2023.
    """

    arguments: dict[str, Any]

    @keeps_arguments
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        model_channels: int,
        channel_mult: Sequence[float],
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        stem_channels: int | None = None,
        num_heads: int | None = None,
        num_head_channels: int | None = None,
        context_dim: int | None = None,
        transformer_depth: int | Sequence[int] = 1,
        use_linear_projection: bool = False,
        disable_self_attention: Sequence[bool] | None = None,
        new_attention_order: bool = False,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        num_classes: int | None = None,
        vector_dim: int | None = None,
        dropout: float = 0.0,
        norm_groups: int = 32,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        levels = len(channel_mult)
        attention = AttentionLayers(
            context_dim=context_dim,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            depths=per_level("transformer_depth", transformer_depth, levels),
            without_self=per_level("disable_self_attention", disable_self_attention or False, levels),
            linear_projection=use_linear_projection,
            new_order=new_attention_order,
            norm_groups=norm_groups,
        )
        layers = UNetLayers(
            widths=[int(model_channels * mult) for mult in channel_mult],
            num_res_blocks=per_level("num_res_blocks", num_res_blocks, levels),
            attends=[2**level in attention_resolutions for level in range(levels)],
            attention=attention,
            emb_dim=4 * model_channels,
            dropout=dropout,
            scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            norm_groups=norm_groups,
        )
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.downsampling_factor = 2 ** (levels - 1)
        self.checkpoint_blocks = checkpoint_blocks
        self.accepted = AcceptedConditions(context_dim, num_classes, vector_dim)
        self.time_embed = _two_layers(model_channels, 4 * model_channels)
        self.label_emb = _label_embedding(num_classes, vector_dim, 4 * model_channels)
        self.input_blocks, skips = layers.encoder(in_channels, stem_channels or model_channels)
        self.middle_block = layers.middle()
        self.output_blocks = layers.decoder(skips)
        self.out = layers.head(out_channels)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Map x (B, C, H, W) at network times t (B,) under cond to (B, out_channels, H, W).

        H and W are multiples of 2^(levels - 1). Raises ValueError when cond lacks a part that the network needs or
        holds one that it has no use for.
        """
        self.accepted.check(cond)
        h = with_extra_channels(x, cond, in_channels=self.in_channels, multiple_of=self.downsampling_factor)
        emb = self._embedding(t, cond, x.dtype)
        skips = []
        for block in self.input_blocks:
            h = self._apply_block(block, h, emb, cond)
            skips.append(h)
        h = self._apply_block(self.middle_block, h, emb, cond)
        for block in self.output_blocks:
            h = self._apply_block(block, torch.cat([h, skips.pop()], dim=1), emb, cond)
        return self.out(h)

    def _apply_block(self, block: nn.Module, h: Tensor, emb: Tensor, cond: Conditioning) -> Tensor:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, h, emb, cond.context, cond.mask, use_reentrant=False)
        return block(h, emb, cond.context, cond.mask)

    def _embedding(self, t: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        emb = self.time_embed(timestep_embedding(t, self.model_channels).to(dtype))
        return emb if self.label_emb is None else emb + self.label_emb(cond.vector)


def _two_layers(dim_in: int, dim_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim_in, dim_out), nn.SiLU(), nn.Linear(dim_out, dim_out))


def _label_embedding(num_classes: int | None, vector_dim: int | None, dim: int) -> nn.Module | None:
    if num_classes is not None:
        return nn.Embedding(num_classes, dim)
    if vector_dim is not None:
        # Nested as in the published weights, whose keys are label_emb.0.0 and label_emb.0.2.
        return nn.Sequential(_two_layers(vector_dim, dim))
    return None
