"""What pretrained text encoders with CLIP's vocabulary have in common."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from textwrap import shorten
from typing import Any, Literal, Self, get_args

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.conditioners.base import Conditioner
from ldm.conditioners.prompts import Chunk, chunk_prompt, weigh
from ldm.conditioners.tokenizers import CLIPTokenizer, read_tokens
from ldm.diffusion import Conditioning

Null = Literal["empty", "zeros"]


class TextEncoder(Conditioner):
    """Captions to Conditioning(context (B, 77, context_dim), vector (B, vector_dim) or None), without a mask.

    The mask is None because the models that use these encoders attend to padding too. Encoders come frozen: without
    gradients, in evaluation mode whatever their parent's, and left out of checkpoints.

    Training captions are read as they are. Prompts, in `prompt_pair`, may hold weights and be long: see
    `ldm.conditioners.prompts`. The vector is then that of the first chunk.

    Args:
        tokenizer: with the padding that the encoder was trained with.
        context_dim, vector_dim: widths; vector_dim is 0 where there is no vector.
        null: the null condition: the encoding of "" (SD 1, SD 2, SDXL refiner), or zeros (SDXL base).
        max_chunks: of 75 tokens; longer prompts are cut, with a warning.
    """

    is_frozen = True

    def __init__(
        self, tokenizer: CLIPTokenizer, *, context_dim: int, vector_dim: int, null: Null, max_chunks: int
    ) -> None:
        super().__init__()
        if null not in get_args(Null):
            raise ValueError(f"got conditioner.null={null}, expected one of {', '.join(get_args(Null))}")
        if max_chunks < 1:
            raise ValueError(f"got conditioner.max_chunks={max_chunks}, expected at least 1")
        self.tokenizer, self.context_dim, self.vector_dim = tokenizer, context_dim, vector_dim
        self.null_kind, self.max_chunks = null, max_chunks

    @abstractmethod
    def encode_ids(self, ids: Tensor) -> Conditioning:
        """Token ids (B, L), each row with start and end, to Conditioning(context (B, L, context_dim), ...)."""

    @property
    @abstractmethod
    def token_embedding(self) -> nn.Embedding:
        """The table of token embeddings."""

    @abstractmethod
    def replace_token_embedding(self, table: nn.Embedding) -> None:
        """Puts another table in the place of `token_embedding`."""

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """Encodes batch["caption"], B strings, as they are."""
        ids, _ = read_tokens(self.tokenizer, batch)
        return self.encode_ids(ids.to(self.token_embedding.weight.device))

    def null(self, n: int) -> Conditioning:
        """The encoding of "", or zeros, n times."""
        if self.null_kind == "empty":
            return self({"caption": [""]}).expand(n)
        weight = self.token_embedding.weight
        context = weight.new_zeros(n, self.tokenizer.length, self.context_dim)
        return Conditioning(context=context, vector=weight.new_zeros(n, self.vector_dim) if self.vector_dim else None)

    def prompt_pair(
        self, prompts: Sequence[str], negatives: Sequence[str], *, image_size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning]:
        """As in `Conditioner`, for prompts with weights, of any length: contexts (B, num_chunks * 77, context_dim).

        Every prompt and negative gets as many chunks as the longest of them. An empty negative is the null condition.
        """
        chunks = {text: self._chunks(text) for text in dict.fromkeys([*prompts, *negatives])}
        num_chunks = max(len(of_text) for of_text in chunks.values())
        cond, uncond = (self._encode([chunks[t] for t in texts], num_chunks) for texts in (prompts, negatives))
        if self.null_kind == "zeros":
            empty = torch.tensor([not text.strip() for text in negatives], device=self.token_embedding.weight.device)
            zeros = Conditioning(**{name: torch.zeros_like(part) for name, part in uncond.parts().items()})
            uncond = uncond.select(empty, zeros)
        return cond, uncond

    def num_chunks(self, text: str) -> int:
        """In how many chunks a prompt is read: it is only split into tokens, not encoded."""
        return min(len(self._split(text)), self.max_chunks)

    def add_tokens(self, names: Sequence[str], vectors: Tensor) -> list[int]:
        """Teaches the tokenizer n names, and the embedding their vectors: textual inversion (Gal et al. 2022).

        Args:
            names: e.g. "<cat-toy>"; found in captions whatever their case, as whole words.
            vectors: (n, D), or (n, k, D) for k tokens a name.

        Returns:
            The new ids, n * k, which are the last rows of `token_embedding`.

        Raises:
            ValueError: vectors of another number or width, or a name that cannot be told from others.
        """
        table = self.token_embedding
        size, width = table.weight.shape
        if vectors.dim() not in (2, 3) or len(vectors) != len(names) or vectors.shape[-1] != width:
            raise ValueError(
                f"got {len(names)} names and vectors {tuple(vectors.shape)}, expected ({len(names)}, {width}) or "
                f"({len(names)}, k, {width}); was this embedding learned with another text encoder?"
            )
        rows = vectors.reshape(-1, width).detach().to(table.weight)
        ids = list(range(size, size + len(rows)))
        per_name = len(ids) // max(len(names), 1)
        self.tokenizer.add({name: ids[i * per_name : (i + 1) * per_name] for i, name in enumerate(names)})
        grown = nn.Embedding.from_pretrained(torch.cat([table.weight.detach(), rows]))
        self.replace_token_embedding(grown.requires_grad_(table.weight.requires_grad))
        return ids

    def train(self, mode: bool = True) -> Self:
        """Frozen encoders stay in evaluation mode."""
        return super().train(mode and not self.is_frozen)

    def _split(self, prompt: str) -> list[Chunk]:
        return chunk_prompt(prompt, self.tokenizer.encode, size=self.tokenizer.length - 2)

    def _chunks(self, prompt: str) -> list[Chunk]:
        chunks = self._split(prompt)
        if len(chunks) > self.max_chunks:
            dropped = sum(len(chunk.ids) for chunk in chunks[self.max_chunks :])
            # From one place whoever asks, so that Python's default filter shows it once a prompt.
            warnings.warn(
                f"cut the last {dropped} tokens of the prompt {shorten(prompt, 40)!r}; "
                f"conditioner.max_chunks={self.max_chunks}",
                stacklevel=1,
            )
        return chunks[: self.max_chunks]

    def _encode(self, chunks_of_texts: Sequence[list[Chunk]], num_chunks: int) -> Conditioning:
        """Encodes each text's chunks, filled up with empty ones, and joins them along the tokens."""
        chunks = [
            chunk for of_text in chunks_of_texts for chunk in [*of_text, *[Chunk([], [])] * (num_chunks - len(of_text))]
        ]
        device = self.token_embedding.weight.device
        encoded = self.encode_ids(torch.stack([self.tokenizer.frame(chunk.ids) for chunk in chunks]).to(device))
        weights = torch.ones(len(chunks), self.tokenizer.length)
        for row, chunk in zip(weights, chunks, strict=True):
            row[1 : 1 + len(chunk.weights)] = torch.tensor(chunk.weights)
        assert encoded.context is not None
        context = weigh(encoded.context, weights.to(device))
        vector = None if encoded.vector is None else encoded.vector[::num_chunks]
        return Conditioning(context=rearrange(context, "(b n) l d -> b (n l) d", n=num_chunks), vector=vector)


def first_end(ids: Tensor, end: int) -> Tensor:
    """The place (B,) of the first end token in each row of ids (B, L): padding may be end tokens too."""
    return (ids == end).int().argmax(1)
