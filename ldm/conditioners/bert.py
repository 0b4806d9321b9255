"""The text transformer that latent diffusion models trained beside their network (Rombach et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.conditioners.base import Conditioner
from ldm.conditioners.tokenizers import Tokenizer, read_tokens
from ldm.diffusion import Conditioning
from ldm.nn.arguments import keeps_arguments


class BERTText(Conditioner):
    """Captions to Conditioning(context (B, L, width)): the encoder of LDM's text-to-image and layout models.

    It is BERT in its vocabulary only. There is no mask: the models attend to padding too. It is not frozen, because
    it was trained with the network; the null condition is the encoding of "".

    Args:
        width, depth: of a pre-norm transformer encoder; txt2img-1.4B is 1280 and 32.
        tokenizer: `WordPieceTokenizer` of bert-base-uncased; None where the weights are only read, written or given
            ids.
        vocabulary_size, length: of the embeddings of tokens and positions.
        heads, head_dim: of attention.

    Attributes:
        transformer: its names, with `transformer.`, are those below `cond_stage_model.` in CompVis files.
    """

    @keeps_arguments
    def __init__(
        self,
        width: int,
        depth: int,
        *,
        tokenizer: Tokenizer | None = None,
        vocabulary_size: int = 30522,
        length: int = 77,
        heads: int = 8,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        if tokenizer is not None and (tokenizer.length > length or tokenizer.vocabulary_size > vocabulary_size):
            raise ValueError(
                f"got a tokenizer of {tokenizer.length} tokens and {tokenizer.vocabulary_size} ids, expected at most "
                f"conditioner.length={length} and vocabulary_size={vocabulary_size}"
            )
        self.tokenizer, self.context_dim = tokenizer, width
        self.transformer = _Transformer(width, depth, vocabulary_size, length, heads, head_dim)

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """Encodes batch["caption"], B strings.

        Raises:
            ValueError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "got a caption for an encoder without its vocabulary, expected vocab.txt of bert-base-uncased; "
                "set conditioner.tokenizer to a WordPieceTokenizer of that file"
            )
        return self.encode_ids(read_tokens(self.tokenizer, batch)[0].to(self.transformer.norm.weight.device))

    def encode_ids(self, ids: Tensor) -> Conditioning:
        """Token ids (B, L) to Conditioning(context (B, L, width))."""
        return Conditioning(context=self.transformer(ids))

    def null(self, n: int) -> Conditioning:
        """The encoding of "", n times."""
        return self({"caption": [""]}).expand(n)


class _Transformer(nn.Module):
    def __init__(self, width: int, depth: int, vocabulary_size: int, length: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(vocabulary_size, width)
        self.pos_emb = nn.ModuleDict({"emb": nn.Embedding(length, width)})
        blocks = (
            nn.ModuleList([nn.LayerNorm(width), block])
            for _ in range(depth)
            for block in (_Attention(width, heads, head_dim), _FeedForward(width))
        )
        self.attn_layers = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.norm = nn.LayerNorm(width)
        # Files hold it; nothing reads it, and what is never used must not wait for a gradient.
        self.to_logits = nn.Linear(width, vocabulary_size).requires_grad_(False)
        for table in (self.token_emb, self.pos_emb["emb"]):
            nn.init.normal_(table.weight, std=0.02)  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_emb(ids) + self.pos_emb["emb"].weight[: ids.shape[1]]  # type: ignore[index]
        for norm, block in self.attn_layers["layers"]:  # type: ignore[attr-defined]
            x = x + block(norm(x))
        return self.norm(x)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, heads * head_dim, bias=False) for _ in range(3))
        self.to_out = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(to(x), "b l (h d) -> b h l d", h=self.heads) for to in (self.to_q, self.to_k, self.to_v))
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)"))


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # The names in files are net.0.0 and net.2.
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU()), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
