"""A text transformer, trained from scratch alongside the diffusion model (Rombach et al. 2022, section 4.3.1)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import rearrange
from torch import nn

from ldm.conditioners.base import Conditioner
from ldm.conditioners.tokenizers import Tokenizer, read_tokens
from ldm.diffusion import Conditioning


class TextTransformer(Conditioner):
    """Captions to token embeddings: Conditioning(context (B, L, width), mask (B, L)).

    The null condition is the empty caption, as in LDM and Stable Diffusion.

    Args:
        tokenizer: from captions to ids; its length is L.
        width, depth, num_heads: of a pre-norm transformer encoder.
        pooling: "sum" adds vector (B, width), the sum over real tokens, for a network with vector_dim=width. Attention
            starts as a mean, in which one word of ten is a tenth; a sum keeps it whole, and small models learn what
            the word means in fewer steps.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        width: int,
        depth: int,
        num_heads: int,
        pooling: Literal["none", "sum"] = "none",
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"got conditioner.width={width}, expected a multiple of num_heads={num_heads}")
        if pooling not in ("none", "sum"):
            raise ValueError(f"got conditioner.pooling={pooling}, expected none or sum")
        self.tokenizer, self.pooling = tokenizer, pooling
        self.token_embedding = nn.Embedding(tokenizer.vocabulary_size, width)
        self.position_embedding = nn.Parameter(torch.randn(tokenizer.length, width) * 0.1)
        layer = nn.TransformerEncoderLayer(
            width, num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        # TransformerEncoder copies its layer, weights and all: draw each layer's own.
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """Encodes batch["caption"], B strings."""
        ids, mask = read_tokens(self.tokenizer, batch)
        ids, mask = ids.to(self.position_embedding.device), mask.to(self.position_embedding.device)
        tokens = self.token_embedding(ids) + self.position_embedding
        context = self.layers(tokens, src_key_padding_mask=~mask)
        if self.pooling == "none":
            return Conditioning(context=context, mask=mask)
        return Conditioning(context=context, mask=mask, vector=(context * rearrange(mask, "b l -> b l 1")).sum(1))

    def null(self, n: int) -> Conditioning:
        """The empty caption, n times."""
        return self({"caption": [""]}).expand(n)
