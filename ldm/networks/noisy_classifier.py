"""The classifier of noisy samples that guides ADM: the way down of its U-Net, and attention that pools."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.networks.unet_blocks import AttentionLayers, UNetLayers
from ldm.nn import GroupNorm32, timestep_embedding
from ldm.nn.arguments import keeps_arguments


class NoisyClassifier(nn.Module):
    """Tells the class of a noisy sample x_t at a network time.

    Parameter names are those of the published weights.

    Args:
        in_channels: of x.
        num_classes: K.
        image_size: pixels a side of x, the only size that it takes.
        model_channels, channel_mult, num_res_blocks, attention_resolutions, num_head_channels, norm_groups: see `UNet`.
        stem_channels: see `UNet`.

    Raises:
        ValueError: an ill-posed geometry; in `forward`, x of another size.

    Source: Dhariwal and Nichol 2021, section 4.3 and table 12.
    """

    arguments: dict[str, Any]

    @keeps_arguments
    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        image_size: int,
        model_channels: int = 128,
        channel_mult: Sequence[float] = (1, 1, 2, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (8, 16, 32),
        num_head_channels: int = 64,
        stem_channels: int | None = None,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        levels = len(channel_mult)
        attention = AttentionLayers(
            context_dim=None,
            num_heads=None,
            num_head_channels=num_head_channels,
            depths=[1] * levels,
            without_self=[False] * levels,
            linear_projection=False,
            new_order=False,
            norm_groups=norm_groups,
        )
        layers = UNetLayers(
            widths=[int(model_channels * mult) for mult in channel_mult],
            num_res_blocks=[num_res_blocks] * levels,
            attends=[2**level in attention_resolutions for level in range(levels)],
            attention=attention,
            emb_dim=4 * model_channels,
            dropout=0.0,
            scale_shift_norm=True,
            resblock_updown=True,
            norm_groups=norm_groups,
        )
        width, self.image_size = layers.widths[-1], image_size
        self.downsampling_factor = 2 ** (levels - 1)
        self.model_channels = model_channels
        emb_dim = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.input_blocks = layers.encoder(in_channels, stem_channels or model_channels)[0]
        self.middle_block = layers.middle()
        pool = AttentionPool(
            width, num_classes, side=image_size // self.downsampling_factor, num_heads=width // num_head_channels
        )
        self.out = nn.Sequential(GroupNorm32(width, groups=norm_groups), nn.SiLU(), pool)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits (B, K) of x (B, C, H, W) at network times t (B,)."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"got samples of {x.shape[-2]}x{x.shape[-1]}, expected {self.image_size}x{self.image_size}, the size "
                "that this classifier was built for; set network.image_size"
            )
        emb = self.time_embed(timestep_embedding(t, self.model_channels).to(x.dtype))
        for block in [*self.input_blocks, self.middle_block]:
            x = block(x, emb, None, None)
        return self.out(x)


class AttentionPool(nn.Module):
    """One query, the mean of all pixels, over the pixels: (B, C, H, W) to (B, dim_out). Source: CLIP (Radford 2021)."""

    def __init__(self, channels: int, dim_out: int, *, side: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, side**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, dim_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Pool the pixels of x."""
        pixels = rearrange(x, "b c h w -> b c (h w)")
        tokens = torch.cat([pixels.mean(2, keepdim=True), pixels], dim=2) + self.positional_embedding.to(x.dtype)
        q, k, v = rearrange(self.qkv_proj(tokens), "b (qkv h d) n -> qkv b h n d", qkv=3, h=self.num_heads)
        found = F.scaled_dot_product_attention(q[:, :, :1], k, v)
        return self.c_proj(rearrange(found, "b h n d -> b (h d) n"))[:, :, 0]
