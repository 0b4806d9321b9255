"""The diffusion transformer: DiT, which is SiT's network too, with an option to look at a text."""

from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioning import Conditioning
from ldm.networks.conditions import AcceptedConditions, with_extra_channels
from ldm.networks.recompute import apply_block
from ldm.nn.arguments import keeps_arguments
from ldm.nn.attention import CrossAttention, zero_module
from ldm.nn.modulation import MLP, ModulatedHead, Modulation, PlainLayerNorm, modulate
from ldm.nn.position import sincos_grid
from ldm.nn.tokens import (
    ClassEmbedder,
    PatchEmbedding,
    SelfAttention,
    TimeEmbedder,
    VectorEmbedder,
    image_of_patches,
)


class DiT(nn.Module):
    """Transformer over patches, conditioned by adaptive layer normalisation that starts at zero (adaLN-Zero).

    Parameter names are those of the published weights of DiT and SiT, but for their fixed `pos_embed`: positions are
    computed here, so that any image size fits.

    Args:
        in_channels: channels of x and, after them, of `cond.concat`.
        out_channels: channels of the output.
        patch_size: side of the patches that become tokens; H and W are multiples of it.
        width, depth, num_heads: of the transformer.
        mlp_ratio: inner width of its feed-forward layers, in widths.
        num_classes: embed class ids, int64 `cond.vector` (B,); the id num_classes is "no class".
        vector_dim: width of a real `cond.vector` (B, vector_dim), taken in by two layers.
        context_dim: width D of `cond.context` (B, L, D), which every block looks at under `cond.mask` (B, L) between
            self-attention and feed-forward, without normalisation (Chen et al. 2024, PixArt-alpha).
        learned_variance: out_channels more come after them, which say the variance of a reverse step (Nichol and
            Dhariwal 2021).
        checkpoint_blocks: recompute every block in the backward pass, to save memory.

    Raises:
        ValueError: an ill-posed geometry; in `forward`, conditions that the network was not built for.

    Source: Peebles and Xie 2023; Ma et al. 2024 (SiT).
    """

    arguments: dict[str, Any]

    @keeps_arguments
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        vector_dim: int | None = None,
        context_dim: int | None = None,
        learned_variance: bool = False,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.accepted = AcceptedConditions(context_dim, num_classes, vector_dim)
        self.in_channels = in_channels
        self.patch_size = self.downsampling_factor = patch_size
        self.width = width
        self.learned_variance = learned_variance
        self.checkpoint_blocks = checkpoint_blocks
        self.x_embedder = PatchEmbedding(in_channels, width, patch_size=patch_size)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = _embedder(num_classes, vector_dim, width)
        hidden = int(mlp_ratio * width)
        self.blocks = nn.ModuleList(
            DiTBlock(width, num_heads=num_heads, hidden=hidden, context_dim=context_dim) for _ in range(depth)
        )
        made = 2 * out_channels if learned_variance else out_channels
        self.final_layer = ModulatedHead(width, patch_size**2 * made)
        initialize(self)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Map x (B, C, H, W) at network times t (B,) under cond to (B, out_channels, H, W), or twice as many."""
        self.accepted.check(cond)
        x = with_extra_channels(x, cond, in_channels=self.in_channels, multiple_of=self.downsampling_factor)
        rows, columns = (size // self.patch_size for size in x.shape[-2:])
        tokens = self._tokens(x, rows, columns)
        vector = self.t_embedder(t, x.dtype)
        if self.y_embedder is not None:
            vector = vector + self.y_embedder(cond.vector)
        for block in self.blocks:
            tokens = apply_block(block, tokens, vector, cond.context, cond.mask, recompute=self.checkpoint_blocks)
        return image_of_patches(self.final_layer(tokens, vector), rows=rows, patch_size=self.patch_size)

    def _tokens(self, x: Tensor, rows: int, columns: int) -> Tensor:
        tokens = self.x_embedder(x)
        of_rows, of_columns = (torch.arange(n, dtype=torch.float32, device=x.device) for n in (rows, columns))
        return tokens + sincos_grid(of_rows, of_columns, self.width).to(tokens.dtype)


class DiTBlock(nn.Module):
    """Transformer block under a vector: tokens (B, N, width), vector (B, width), context (B, L, D), mask (B, L)."""

    def __init__(self, width: int, *, num_heads: int, hidden: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.norm1 = PlainLayerNorm(width)
        self.attn = SelfAttention(width, num_heads=num_heads)
        self.cross_attn = None
        if context_dim is not None:
            self.cross_attn = CrossAttention(width, num_heads=num_heads, context_dim=context_dim)
        self.norm2 = PlainLayerNorm(width)
        self.mlp = MLP(width, hidden)
        self.adaLN_modulation = Modulation(width, 6)

    def forward(
        self, tokens: Tensor, vector: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Give tokens (B, N, width)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(vector)
        tokens = tokens + gate[:, None] * self.attn(modulate(self.norm1(tokens), shift, scale))
        if self.cross_attn is not None:
            tokens = tokens + self.cross_attn(tokens, context, mask)
        return tokens + mlp_gate[:, None] * self.mlp(modulate(self.norm2(tokens), mlp_shift, mlp_scale))


def initialize(transformer: nn.Module) -> None:
    """Set the weights of a diffusion transformer as Peebles and Xie 2023 do.

    Linear layers and patch embedding Xavier-uniform without offset, embeddings normal(0, 0.02), and zero for every
    modulation, the head, and cross-attention's way out.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in transformer.modules():
        if isinstance(module, TimeEmbedder | VectorEmbedder):
            for layer in module.mlp:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
        elif isinstance(module, ClassEmbedder):
            nn.init.normal_(module.embedding_table.weight, std=0.02)
        elif isinstance(module, Modulation):
            zero_module(module)
        elif isinstance(module, ModulatedHead):
            zero_module(module.linear)
        elif isinstance(module, CrossAttention):
            zero_module(module.to_out)


def _embedder(num_classes: int | None, vector_dim: int | None, width: int) -> nn.Module | None:
    if num_classes is not None:
        return ClassEmbedder(num_classes, width)
    if vector_dim is not None:
        return VectorEmbedder(vector_dim, width)
    return None
