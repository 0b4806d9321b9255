"""The blocks of MicroDiT: they grow wider from one to the next, and every other one is made of experts."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.nn.attention import zero_module
from ldm.nn.experts import ExpertChoice
from ldm.nn.modulation import Modulation, modulate

TanhGELU = partial(nn.GELU, approximate="tanh")
ScaledLayerNorm = partial(nn.LayerNorm, eps=1e-6, bias=False)
# Inner widths of feed-forward layers are rounded up to multiples of it.
HIDDEN_UNIT = 256
CAPTION_MLP_RATIO = 4.0


class MicroBlock(nn.Module):
    """Transformer block: tokens (B, N, width) under a vector (B, vector_dim), looking at a text (B, L, width).

    Inside, self-attention is `inner` wide; `mlp` is the feed-forward layer.
    """

    def __init__(
        self, width: int, *, inner: int, mlp: "SwiGLU | ExpertChoice", vector_dim: int, head_width: int
    ) -> None:
        super().__init__()
        self.norm1 = ScaledLayerNorm(width)
        self.attn = NormalizedSelfAttention(width, inner, head_width=head_width)
        self.norm2 = ScaledLayerNorm(width)
        self.cross_attn = NormalizedCrossAttention(width, head_width=head_width)
        self.norm3 = ScaledLayerNorm(width)
        self.mlp = mlp
        self.adaLN_modulation = Modulation(width, 6, vector_dim=vector_dim, activation=TanhGELU)

    def initialize(self, out_std: float) -> None:
        """Set the weights: normal, of standard deviation out_std where something is added to the tokens."""
        for part in (self.attn, self.cross_attn, self.mlp):
            part.initialize(out_std)

    def forward(self, tokens: Tensor, vector: Tensor, text: Tensor) -> Tensor:
        """Give tokens (B, N, width)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(vector)
        tokens = tokens + gate[:, None] * self.attn(modulate(self.norm1(tokens), shift, scale))
        tokens = tokens + self.cross_attn(self.norm2(tokens), text)
        return tokens + mlp_gate[:, None] * self.mlp(modulate(self.norm3(tokens), mlp_shift, mlp_scale))


class CaptionBlock(nn.Module):
    """Transformer block over the tokens of a text (B, L, width), which starts as the identity."""

    def __init__(self, width: int, *, head_width: int) -> None:
        super().__init__()
        self.norm1 = ScaledLayerNorm(width)
        self.attn = NormalizedSelfAttention(width, width, head_width=head_width)
        self.norm2 = ScaledLayerNorm(width)
        self.mlp = SwiGLU(width, int(width * CAPTION_MLP_RATIO))

    def initialize(self) -> None:
        """Set the weights, to zero where something is added to the tokens."""
        for part in (self.attn, self.mlp):
            part.initialize(0.02)
        zero_module(self.attn.proj)
        zero_module(self.mlp.w3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Give tokens (B, L, width)."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class NormalizedSelfAttention(nn.Module):
    """Attention among tokens (B, N, width), `inner` wide inside; queries and keys are normalised over all heads."""

    def __init__(self, width: int, inner: int, *, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.proj = nn.Linear(inner, width, bias=False)

    def initialize(self, out_std: float) -> None:
        """Normal weights of standard deviation 0.02, and out_std for the way out."""
        nn.init.trunc_normal_(self.qkv.weight, std=0.02)
        nn.init.trunc_normal_(self.proj.weight, std=out_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend among tokens."""
        return self.proj(_attended(*self.qkv(tokens).chunk(3, dim=-1), head_width=self.head_width))


class NormalizedCrossAttention(nn.Module):
    """Attention from tokens (B, N, width) to a text (B, L, width), with queries and keys as in self-attention.

    Raises ValueError when the width does not divide into the heads.
    """

    def __init__(self, width: int, *, head_width: int) -> None:
        super().__init__()
        if width % head_width:
            raise ValueError(f"got a width of {width}, expected a multiple of head_width {head_width}; change either")
        self.head_width = head_width
        self.q_linear = nn.Linear(width, width, bias=False)
        self.kv_linear = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def initialize(self, out_std: float) -> None:
        """Normal weights of standard deviation 0.02, and out_std for the way out."""
        nn.init.trunc_normal_(self.q_linear.weight, std=0.02)
        nn.init.trunc_normal_(self.kv_linear.weight, std=0.02)
        nn.init.trunc_normal_(self.proj.weight, std=out_std)

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        """Attend from the tokens to the text."""
        keys, values = self.kv_linear(text).chunk(2, dim=-1)
        return self.proj(_attended(self.q_linear(tokens), keys, values, head_width=self.head_width))


class SwiGLU(nn.Module):
    """A layer gated by the SiLU of another: (B, N, width) to (B, N, width), with a third fewer units than asked for.

    So it has the parameters of two layers of `hidden` units, rounded up to `HIDDEN_UNIT`. Source: Shazeer 2020.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        units = _rounded_up(int(2 * hidden / 3), HIDDEN_UNIT)
        self.w1 = nn.Linear(width, units, bias=False)
        self.w2 = nn.Linear(width, units, bias=False)
        self.w3 = nn.Linear(units, width, bias=False)

    def initialize(self, out_std: float) -> None:
        """Normal weights of standard deviation 0.02 for the gate, and out_std for the others."""
        for layer, std in ((self.w1, 0.02), (self.w2, out_std), (self.w3, out_std)):
            nn.init.trunc_normal_(layer.weight, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map every token by itself."""
        return self.w3(F.silu(self.w1(tokens)) * self.w2(tokens))


def micro_blocks(
    width: int,
    depth: int,
    *,
    vector_dim: int,
    head_width: int,
    attention_ratios: Sequence[float],
    mlp_ratios: Sequence[float],
    num_experts: int,
    capacity: float,
    ends_dense: bool = False,
) -> Iterator[MicroBlock]:
    """Blocks whose inner widths, in widths, go from a first to a last ratio: see `MicroDiT`.

    Attention is rounded up to an even number of heads, and feed-forward layers to `HIDDEN_UNIT`.
    Every other block is of experts, but for the last one where `ends_dense` says so.
    """
    for index, (of_attention, of_mlp) in enumerate(
        zip(_line(attention_ratios, depth), _line(mlp_ratios, depth), strict=True)
    ):
        inner = width if of_attention == 1 else _rounded_up(int(width * of_attention), 2 * head_width)
        hidden = int(width * of_mlp)
        mlp: SwiGLU | ExpertChoice = SwiGLU(width, hidden)
        if index % 2 and not (ends_dense and index == depth - 1):
            hidden = _rounded_up(hidden, HIDDEN_UNIT)
            mlp = ExpertChoice(width, hidden, num_experts=num_experts, capacity=capacity)
        yield MicroBlock(width, inner=inner, mlp=mlp, vector_dim=vector_dim, head_width=head_width)


def _attended(queries: Tensor, keys: Tensor, values: Tensor, *, head_width: int) -> Tensor:
    """Attention of heads, all (B, N, heads head_width), after queries and keys are normalised over all of it."""
    # Under autocast the norm gives float32, for which there is no fused attention.
    normed = (F.layer_norm(one, one.shape[-1:], eps=1e-6).to(one.dtype) for one in (queries, keys))
    q, k, v = (rearrange(one, "b n (h d) -> b h n d", d=head_width) for one in (*normed, values))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def _line(ends: Sequence[float], num: int) -> list[float]:
    first, last = ends
    return [first + (last - first) * index / max(1, num - 1) for index in range(num)]


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
