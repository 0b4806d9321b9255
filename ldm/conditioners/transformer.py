"""A text transformer that is trained from scratch alongside the diffusion model (Rombach et al. 2022, section 4.3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ldm.conditioners.tokenizers import Tokenizer
from ldm.diffusion import Conditioning


class TextTransformer(nn.Module):
    """Captions to token embeddings: Conditioning(context (B, L, width), mask (B, L)).

    The null condition is the empty caption, as in LDM and Stable Diffusion.

    Args:
        tokenizer: from captions to ids; its length is L.
        width, depth, num_heads: of a pre-norm transformer encoder.
    """

    def __init__(self, tokenizer: Tokenizer, *, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"got conditioner.width={width}, expected a multiple of num_heads={num_heads}")
        self.tokenizer = tokenizer
        self.token_embedding = nn.Embedding(tokenizer.vocabulary_size, width)
        self.position_embedding = nn.Parameter(torch.randn(tokenizer.length, width) * 0.01)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            width, num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """Encodes batch["caption"], B strings."""
        ids, mask = self.tokenizer(batch["caption"])
        ids, mask = ids.to(self.position_embedding.device), mask.to(self.position_embedding.device)
        tokens = self.token_embedding(ids) + self.position_embedding
        return Conditioning(context=self.layers(tokens, src_key_padding_mask=~mask), mask=mask)

    def null(self, n: int) -> Conditioning:
        """The empty caption, n times."""
        one = self({"caption": [""]})
        assert one.context is not None and one.mask is not None
        return Conditioning(context=one.context.expand(n, -1, -1), mask=one.mask.expand(n, -1))
