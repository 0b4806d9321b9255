"""MicroDiT: a diffusion transformer that may be trained on a quarter of the patches, after a mixer has seen all."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.diffusion.conditioning import Conditioning
from ldm.networks.conditions import AcceptedConditions, with_extra_channels
from ldm.networks.dit import initialize
from ldm.networks.micro_blocks import CaptionBlock, MicroBlock, ScaledLayerNorm, TanhGELU, micro_blocks
from ldm.networks.recompute import apply_block
from ldm.nn.arguments import keeps_arguments
from ldm.nn.modulation import ModulatedHead, Modulation
from ldm.nn.position import sincos_grid
from ldm.nn.tokens import PatchEmbedding, TimeEmbedder, image_of_patches, tokens_at, tokens_put

MIXER_MLP_RATIOS = (4.0, 4.0)


class MicroDiT(nn.Module):
    """Transformer over patches that looks at a text, with blocks that grow wider, every other one made of experts.

    A patch mixer, a narrower transformer, sees all patches. While the network drops patches, the blocks after it see a
    random part of them only, and the output tells so: a last channel is 1 where the network answered, and 0 with the
    rest of the output elsewhere. Parameter names are those of the published weights, but for their fixed `pos_embed`
    and `mask_token`: positions are computed here, and a dropped patch is zero.

    Args:
        in_channels: channels of x and, after them, of `cond.concat`.
        out_channels: channels of the output.
        patch_size: side of the patches that become tokens; H and W are multiples of it.
        width, depth, head_width: of the transformer.
        mixer_width, mixer_depth: of the patch mixer.
        context_dim: width D of `cond.context` (B, L, D), which every block looks at, and whose mean is added to time.
        attention_ratios: inner width of self-attention in the first and last block, in widths; on a line between them.
        mlp_ratios: the same of feed-forward layers.
        num_experts: in the second block, the fourth, and so on, but for the last block of the transformer.
        expert_capacity: how many of them take a token, on average.
        position_scale: patches from one position to the next: 2 for images twice as large as those trained on before.
        drop_patches: share of the patches that are dropped in training mode, drawn from torch's generator.
        checkpoint_blocks: recompute every block in the backward pass, to save memory.

    Attributes:
        drops_patches: whether it drops patches now.

    Raises:
        ValueError: an ill-posed geometry; in `forward`, conditions that the network was not built for.

    Source: Sehwag et al. 2024, "Stretching Each Dollar".
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
        head_width: int,
        mixer_width: int,
        mixer_depth: int,
        context_dim: int,
        attention_ratios: Sequence[float] = (0.5, 1.0),
        mlp_ratios: Sequence[float] = (0.5, 4.0),
        num_experts: int = 8,
        expert_capacity: float = 2.0,
        position_scale: float = 1.0,
        drop_patches: float = 0.0,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= drop_patches < 1:
            raise ValueError(f"got drop_patches {drop_patches}, expected a share from 0 up to, not including, 1")
        self.accepted = AcceptedConditions(context_dim, None, None)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.patch_size = self.downsampling_factor = patch_size
        self.width = width
        self.position_scale, self.drop_patches = position_scale, drop_patches
        self.checkpoint_blocks = checkpoint_blocks
        self.x_embedder = PatchEmbedding(in_channels, width, patch_size=patch_size)
        self.t_embedder = TimeEmbedder(width, frequencies=512, activation=TanhGELU)
        self.y_embedder = nn.ModuleDict({"y_proj": NormalizedMLP(context_dim, width)})
        self.y_emb_preprocess = CaptionBlock(width, head_width=head_width)
        self.pooled_y_emb_process = NormalizedMLP(width, width)
        self.patch_mixer_map_xin = _mapped(width, mixer_width)
        self.patch_mixer_map_y = _mapped(width, mixer_width)
        self.patch_mixer_map_xout = _mapped(mixer_width, width)
        blocks = partial(
            micro_blocks, vector_dim=width, head_width=head_width, num_experts=num_experts, capacity=expert_capacity
        )
        self.patch_mixer = nn.ModuleList(
            blocks(mixer_width, mixer_depth, attention_ratios=(1, 1), mlp_ratios=MIXER_MLP_RATIOS)
        )
        self.blocks = nn.ModuleList(
            blocks(width, depth, attention_ratios=attention_ratios, mlp_ratios=mlp_ratios, ends_dense=True)
        )
        self.final_layer = ScaledHead(width, patch_size**2 * out_channels)
        self._initialize()

    @property
    def drops_patches(self) -> bool:
        return self.training and self.drop_patches > 0

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Map x (B, C, H, W) at network times t (B,) under cond to (B, out_channels, H, W), or one channel more."""
        self.accepted.check(cond)
        if cond.mask is not None:
            raise ValueError("got a mask of the context, expected none; use a conditioner whose tokens are all read")
        x = with_extra_channels(x, cond, in_channels=self.in_channels, multiple_of=self.downsampling_factor)
        rows, columns = (size // self.patch_size for size in x.shape[-2:])
        assert cond.context is not None
        text = self.y_emb_preprocess(self.y_embedder["y_proj"](cond.context))
        vector = self.t_embedder(t, x.dtype) + self.pooled_y_emb_process(text.mean(1))
        tokens = self.patch_mixer_map_xin(self._tokens(x, rows, columns))
        tokens = self._through(self.patch_mixer, tokens, vector, self.patch_mixer_map_y(text))
        places = self._kept(tokens) if self.drops_patches else None
        if places is not None:
            tokens = tokens_at(tokens, places)
        tokens = self._through(self.blocks, self.patch_mixer_map_xout(tokens), vector, text)
        patches = self.final_layer(tokens, vector)
        if places is not None:
            patches = tokens_put(self._marked(patches), places, num=rows * columns)
        return image_of_patches(patches, rows=rows, patch_size=self.patch_size)

    def _tokens(self, x: Tensor, rows: int, columns: int) -> Tensor:
        tokens = self.x_embedder(x)
        of_rows, of_columns = (
            torch.arange(n, dtype=torch.float32, device=x.device) / self.position_scale for n in (rows, columns)
        )
        return tokens + sincos_grid(of_rows, of_columns, self.width).to(tokens.dtype)

    def _through(self, blocks: Iterable[nn.Module], tokens: Tensor, vector: Tensor, text: Tensor) -> Tensor:
        for block in blocks:
            tokens = apply_block(block, tokens, vector, text, recompute=self.checkpoint_blocks)
        return tokens

    def _kept(self, tokens: Tensor) -> Tensor:
        """The places (B, K) of the patches that are kept, at least one, drawn for each sample by itself."""
        num = tokens.shape[1]
        draws = torch.rand(tokens.shape[:2], device=tokens.device)
        return draws.argsort(1)[:, : max(1, int(num * (1 - self.drop_patches)))]

    def _marked(self, patches: Tensor) -> Tensor:
        """Patches (B, K, P C) with a channel of ones after the others: (B, K, P (C + 1))."""
        values = rearrange(patches, "b k (p c) -> b k p c", c=self.out_channels)
        return F.pad(values, (0, 1), value=1.0).flatten(2)

    def _initialize(self) -> None:
        """As published: blocks deeper in start with smaller ways out, and what is said of the text with none."""
        initialize(self)
        for part in self.modules():
            if isinstance(part, NormalizedMLP | CaptionBlock):
                part.initialize()
        depth = len(self.blocks)
        depths = [depth] * len(self.patch_mixer) + list(range(1, depth + 1))
        blocks = (part for part in self.modules() if isinstance(part, MicroBlock))
        for block, place in zip(blocks, depths, strict=True):
            block.initialize(0.02 / (2 * place) ** 0.5)


class NormalizedMLP(nn.Module):
    """Two layers with GELU and a layer norm between them: (..., dim) to (..., width)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.norm = ScaledLayerNorm(width)
        self.fc2 = nn.Linear(width, width)

    def initialize(self) -> None:
        """Normal weights of standard deviation 0.02."""
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map every vector by itself."""
        return self.fc2(self.norm(F.gelu(self.fc1(x), approximate="tanh")))


class ScaledHead(ModulatedHead):
    """A head whose layer norm has a scale of its own."""

    def __init__(self, width: int, dim_out: int) -> None:
        super().__init__(width, dim_out)
        self.adaLN_modulation = Modulation(width, 2, activation=TanhGELU)
        self.norm_final = ScaledLayerNorm(width)


def _mapped(dim: int, width: int) -> nn.Sequential:
    return nn.Sequential(ScaledLayerNorm(dim), nn.Linear(dim, width, bias=False))
