"""MMDiT: a transformer in which a text and an image attend jointly, each with weights of its own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.conditioning import Conditioning
from ldm.networks.conditions import AcceptedConditions, with_extra_channels
from ldm.networks.dit import initialize
from ldm.networks.recompute import apply_block
from ldm.nn.arguments import keeps_arguments
from ldm.nn.modulation import MLP, ModulatedHead, Modulation, PlainLayerNorm, modulate
from ldm.nn.position import centred_positions, sincos_grid
from ldm.nn.tokens import PatchEmbedding, SelfAttention, TimeEmbedder, VectorEmbedder, image_of_patches


class MMDiT(nn.Module):
    """Transformer over the patches of an image and the tokens of a text, conditioned on time and a pooled vector.

    Parameter names are those of the published weights of Stable Diffusion 3, but for their fixed `pos_embed`.

    Args:
        in_channels: channels of x and, after them, of `cond.concat`.
        out_channels: channels of the output.
        patch_size: side of the patches that become tokens; H and W are multiples of it.
        width, depth, num_heads: of the transformer; Esser et al. take width 64 depth and depth heads.
        context_dim: width D of `cond.context` (B, L, D); `cond.mask` (B, L) hides text tokens from attention.
        vector_dim: width of the pooled `cond.vector` (B, vector_dim).
        max_positions: patches along a side of the largest grid; smaller images take positions from its middle.
        base_positions: the grid is squeezed to the extent of that many patches; None leaves it as it is.
        qk_norm: normalise queries and keys (Stable Diffusion 3.5).
        self_attention_blocks: in so many blocks, from the first, the image attends to itself too, beside the joint
            attention (Stable Diffusion 3.5 medium, "MMDiT-X").
        checkpoint_blocks: recompute every block in the backward pass, to save memory.

    Raises:
        ValueError: an ill-posed geometry; in `forward`, conditions that the network was not built for, or an image of
            more patches a side than max_positions.

    Source: Esser et al. 2024.
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
        context_dim: int,
        vector_dim: int,
        max_positions: int,
        base_positions: int | None = None,
        qk_norm: bool = False,
        self_attention_blocks: int = 0,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= self_attention_blocks <= depth:
            raise ValueError(f"got self_attention_blocks {self_attention_blocks}, expected 0 to the depth, {depth}")
        self.accepted = AcceptedConditions(context_dim, None, vector_dim)
        self.in_channels = in_channels
        self.patch_size = self.downsampling_factor = patch_size
        self.width = width
        self.max_positions = max_positions
        self.position_step = 1.0 if base_positions is None else base_positions / max_positions
        self.checkpoint_blocks = checkpoint_blocks
        self.x_embedder = PatchEmbedding(in_channels, width, patch_size=patch_size)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = VectorEmbedder(vector_dim, width)
        self.context_embedder = nn.Linear(context_dim, width)
        self.joint_blocks = nn.ModuleList(
            JointBlock(
                width,
                num_heads=num_heads,
                qk_norm=qk_norm,
                text_ends=index == depth - 1,
                self_attention=index < self_attention_blocks,
            )
            for index in range(depth)
        )
        self.final_layer = ModulatedHead(width, patch_size**2 * out_channels)
        initialize(self)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Map x (B, C, H, W) at network times t (B,) under cond to (B, out_channels, H, W)."""
        self.accepted.check(cond)
        x = with_extra_channels(x, cond, in_channels=self.in_channels, multiple_of=self.downsampling_factor)
        rows, columns = (size // self.patch_size for size in x.shape[-2:])
        image = self._tokens(x, rows, columns)
        text = self.context_embedder(cond.context)
        vector = self.t_embedder(t, x.dtype) + self.y_embedder(cond.vector)
        visible = _visible(cond.mask, rows * columns)
        for block in self.joint_blocks:
            image, text = apply_block(block, image, text, vector, visible, recompute=self.checkpoint_blocks)
        return image_of_patches(self.final_layer(image, vector), rows=rows, patch_size=self.patch_size)

    def _tokens(self, x: Tensor, rows: int, columns: int) -> Tensor:
        tokens = self.x_embedder(x)
        of_rows, of_columns = (
            centred_positions(n, max_positions=self.max_positions, step=self.position_step, device=x.device)
            for n in (rows, columns)
        )
        return tokens + sincos_grid(of_rows, of_columns, self.width).to(tokens.dtype)


class JointBlock(nn.Module):
    """One block of two streams: image (B, N, width) and text (B, L, width) under a vector (B, width).

    In the last block (`text_ends`) the image looks at the text once more and nothing becomes of the text itself.
    With `self_attention` the image looks at itself alone as well.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        qk_norm: bool = False,
        text_ends: bool = False,
        self_attention: bool = False,
    ) -> None:
        super().__init__()
        self.text_ends = text_ends
        make_text_stream = TellingStream if text_ends else Stream
        self.context_block: Stream | TellingStream = make_text_stream(width, num_heads=num_heads, qk_norm=qk_norm)
        make_image_stream = DualStream if self_attention else Stream
        self.x_block = make_image_stream(width, num_heads=num_heads, qk_norm=qk_norm)

    def forward(
        self, image: Tensor, text: Tensor, vector: Tensor, visible: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Give image and text after the block; `visible` (B, 1, 1, N + L) hides tokens from attention."""
        (q, k, v), image_gates = self.x_block.before_attention(image, vector)
        (text_q, text_k, text_v), text_gates = self.context_block.before_attention(text, vector)
        queries = q if self.text_ends else torch.cat([q, text_q], dim=2)
        keys, values = torch.cat([k, text_k], dim=2), torch.cat([v, text_v], dim=2)
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible)
        of_image, of_text = found.split([image.shape[1], queries.shape[2] - image.shape[1]], dim=2)
        image = self.x_block.after_attention(image, of_image, image_gates)
        return image, self.context_block.after_attention(text, of_text, text_gates)


class Stream(nn.Module):
    """One of the two streams of a block; its attention happens outside, between its two methods."""

    def __init__(self, width: int, *, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = PlainLayerNorm(width)
        self.attn = SelfAttention(width, num_heads=num_heads, qk_norm=qk_norm)
        self.norm2 = PlainLayerNorm(width)
        self.mlp = MLP(width, 4 * width)
        self.adaLN_modulation = Modulation(width, 6)

    def before_attention(
        self, tokens: Tensor, vector: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """Queries, keys and values of the tokens, and the modulation left for `after_attention`."""
        shift, scale, *rest = self.adaLN_modulation(vector)
        return self.attn.heads(modulate(self.norm1(tokens), shift, scale)), tuple(rest)

    def after_attention(self, tokens: Tensor, found: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """The tokens (B, N, width) with what attention found, (B, heads, N, width / heads), and the feed-forward."""
        gate, shift, scale, mlp_gate = modulation
        tokens = tokens + gate[:, None] * self.attn.merged(found)
        return tokens + mlp_gate[:, None] * self.mlp(modulate(self.norm2(tokens), shift, scale))


class DualStream(Stream):
    """A stream that attends among its own tokens beside what happens outside, under a modulation of its own."""

    def __init__(self, width: int, *, num_heads: int, qk_norm: bool) -> None:
        super().__init__(width, num_heads=num_heads, qk_norm=qk_norm)
        self.attn2 = SelfAttention(width, num_heads=num_heads, qk_norm=qk_norm)
        self.adaLN_modulation = Modulation(width, 9)

    def before_attention(
        self, tokens: Tensor, vector: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """As in `Stream`; what the tokens find among themselves goes with the modulation that is left."""
        shift, scale, *rest, own_shift, own_scale, own_gate = self.adaLN_modulation(vector)
        normalised = self.norm1(tokens)
        own = own_gate[:, None] * self.attn2(modulate(normalised, own_shift, own_scale))
        return self.attn.heads(modulate(normalised, shift, scale)), (*rest, own)

    def after_attention(self, tokens: Tensor, found: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """As in `Stream`, with what the tokens found among themselves."""
        gate, shift, scale, mlp_gate, own = modulation
        tokens = tokens + gate[:, None] * self.attn.merged(found) + own
        return tokens + mlp_gate[:, None] * self.mlp(modulate(self.norm2(tokens), shift, scale))


class TellingStream(nn.Module):
    """The text's stream of the last block: it gives keys and values; its queries are there for the published names."""

    def __init__(self, width: int, *, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = PlainLayerNorm(width)
        self.attn = SelfAttention(width, num_heads=num_heads, qk_norm=qk_norm, project=False)
        self.adaLN_modulation = Modulation(width, 2)

    def before_attention(
        self, tokens: Tensor, vector: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """Queries, keys and values of the tokens, as in `Stream`; no modulation is left."""
        shift, scale = self.adaLN_modulation(vector)
        return self.attn.heads(modulate(self.norm1(tokens), shift, scale)), ()

    def after_attention(self, tokens: Tensor, found: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """The tokens as they are."""
        return tokens


def _visible(mask: Tensor | None, num_patches: int) -> Tensor | None:
    """The mask (B, L) of the text, extended to the patches before it, which are always seen: (B, 1, 1, N + L)."""
    if mask is None:
        return None
    return F.pad(mask, (num_patches, 0), value=True)[:, None, None]
