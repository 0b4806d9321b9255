"""Attention: the spatial transformer with cross-attention, and the older attention over pixels alone."""

from typing import TypeVar

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.nn.norm import GroupNorm32

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def zero_module(module: ModuleT) -> ModuleT:
    """Set every parameter of the module to zero, so that its residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _check_heads(channels: int, num_heads: int) -> None:
    if num_heads < 1 or channels % num_heads:
        raise ValueError(
            f"got {channels} channels for {num_heads} attention heads, expected a multiple of the heads; "
            "change the channels, num_heads or num_head_channels"
        )


class CrossAttention(nn.Module):
    """Multi-head attention from x to a context, or to x itself when no context is given.

    x (B, N, width), context (B, L, context_dim), mask (B, L) bool with True for tokens that may be seen; gives
    (B, N, width). Raises ValueError when the width does not divide into the heads.
    Source: Rombach et al. 2022, section 3.3.
    """

    def __init__(self, width: int, *, num_heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        _check_heads(width, num_heads)
        self.num_heads = num_heads
        context_dim = width if context_dim is None else context_dim
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        # A sequence of one: the published weights call this layer to_out.0.
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend from x (B, N, width) to context (B, L, context_dim) under mask (B, L)."""
        context = x if context is None else context
        q, k, v = (
            rearrange(part, "b n (h d) -> b h n d", h=self.num_heads)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        visible = None if mask is None else rearrange(mask, "b l -> b 1 1 l")
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    """Linear layer gated by the exact (erf) GELU: (B, N, dim_in) to (B, N, dim_out). Source: Shazeer 2020."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """Give value * gelu(gate)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers with a GEGLU between them, four times as wide inside: (B, N, width) to (B, N, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The identity stands where the published networks had a dropout of 0, so that the last layer is net.2.
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map every token by itself."""
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Pre-norm transformer block: attention to itself, to the context, then feed-forward.

    x (B, N, width), context (B, L, context_dim), mask (B, L) bool. With self_attention False the first attention
    looks at the context too (the x4 upscaler does so at high resolutions).
    """

    def __init__(self, width: int, *, num_heads: int, context_dim: int, self_attention: bool = True) -> None:
        super().__init__()
        self.self_attention = self_attention
        first_context = None if self_attention else context_dim
        self.attn1 = CrossAttention(width, num_heads=num_heads, context_dim=first_context)
        self.attn2 = CrossAttention(width, num_heads=num_heads, context_dim=context_dim)
        self.ff = FeedForward(width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Give tokens (B, N, width)."""
        first = (None, None) if self.self_attention else (context, mask)
        x = x + self.attn1(self.norm1(x), *first)
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer over the pixels of a feature map, as a residual branch that starts at zero.

    x (B, C, H, W), context (B, L, context_dim), mask (B, L) bool; gives (B, C, H, W). The projections in and out
    are 1x1 convolutions (Stable Diffusion 1) or, with linear_projection, linear layers (2 and XL).
    Raises ValueError for channels that do not divide into heads or groups. Source: Rombach et al. 2022, appendix E.2.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        context_dim: int,
        depth: int = 1,
        linear_projection: bool = False,
        self_attention: bool = True,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = GroupNorm32(channels, groups=norm_groups, eps=1e-6)
        self.proj_in = _projection(channels, linear_projection)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, num_heads=num_heads, context_dim=context_dim, self_attention=self_attention)
            for _ in range(depth)
        )
        self.proj_out = zero_module(_projection(channels, linear_projection))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Give x plus what the transformer adds to it."""
        height = x.shape[-2]
        tokens = self._tokens(self.norm(x))
        for block in self.transformer_blocks:
            tokens = block(tokens, context, mask)
        if self.linear_projection:
            return x + rearrange(self.proj_out(tokens), "b (h w) c -> b c h w", h=height)
        return x + self.proj_out(rearrange(tokens, "b (h w) c -> b c h w", h=height))

    def _tokens(self, x: Tensor) -> Tensor:
        if self.linear_projection:
            return self.proj_in(rearrange(x, "b c h w -> b (h w) c"))
        # Made contiguous once: the residual additions of the blocks would otherwise keep the channel-major strides.
        return rearrange(self.proj_in(x), "b c h w -> b (h w) c").contiguous()


def _projection(channels: int, linear: bool) -> nn.Linear | nn.Conv2d:
    return nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)


class AttentionBlock(nn.Module):
    """Self-attention over pixels, as a residual branch that starts at zero: (B, C, H, W) to (B, C, H, W).

    The unconditional networks of latent-diffusion use it. Their `qkv` rows are laid out (head, q/k/v, channel); with
    new_order they are (q/k/v, head, channel). The two are not interchangeable for given weights.
    Raises ValueError for channels that do not divide into heads or groups. Source: Dhariwal and Nichol 2021.
    """

    def __init__(self, channels: int, *, num_heads: int, new_order: bool = False, norm_groups: int = 32) -> None:
        super().__init__()
        _check_heads(channels, num_heads)
        self.num_heads = num_heads
        self.pattern = "b (three h d) n -> three b h n d" if new_order else "b (h three d) n -> three b h n d"
        self.norm = GroupNorm32(channels, groups=norm_groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Give x plus the attention over its pixels."""
        height = x.shape[-2]
        qkv = self.qkv(rearrange(self.norm(x), "b c h w -> b c (h w)"))
        q, k, v = rearrange(qkv, self.pattern, three=3, h=self.num_heads).contiguous()
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b (h d) n")
        return x + rearrange(self.proj_out(out), "b c (h w) -> b c h w", h=height)
