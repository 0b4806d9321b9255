"""Boxes as tokens: the conditioner of LDM's layout-to-image models (Rombach et al. 2022, section 4.3.1)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ldm.conditioners.base import Conditioner
from ldm.conditioners.bert import BERTText
from ldm.diffusion import Conditioning
from ldm.nn.arguments import keeps_arguments


class Layout(Conditioner):
    """batch["boxes"] to Conditioning(context (B, 3 * max_boxes + 2, width)), encoded by LDM's transformer.

    A box (class, left, top, right, bottom), places in shares of the picture, is three tokens: its class, its upper left
    and its lower right corner, each corner a cell of a square grid of as many cells as the vocabulary has room for;
    two more tokens say which part of the picture is shown, here all of it. The last id says "no box".
    A layout is asked for by its boxes as json: prompt='[[3, 0.1, 0.1, 0.5, 0.6]]'.

    Args:
        width, depth: of the transformer.
        vocabulary_size: of its tokens: 8192 in the published models.
        max_boxes: 30 in the published models, which makes 92 tokens.
        heads, head_dim: of attention.
    """

    @keeps_arguments
    def __init__(
        self,
        width: int = 512,
        depth: int = 16,
        *,
        vocabulary_size: int = 8192,
        max_boxes: int = 30,
        heads: int = 8,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        if vocabulary_size < 5 or max_boxes < 1:
            raise ValueError(f"got vocabulary_size={vocabulary_size}, max_boxes={max_boxes}, expected 5 and 1 at least")
        self.vocabulary_size, self.max_boxes, self.context_dim = vocabulary_size, max_boxes, width
        self.cells = isqrt(vocabulary_size - 1)
        length = 3 * max_boxes + 2
        self.encoder = BERTText(
            width, depth, vocabulary_size=vocabulary_size, length=length, heads=heads, head_dim=head_dim
        )

    @property
    def _nothing(self) -> int:
        return self.vocabulary_size - 1

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """Encodes batch["boxes"] (B, N, 5), N at most max_boxes; rows of class -1 are none.

        Raises:
            ValueError: the batch has no boxes, too many, or a class that has no token.
        """
        if "boxes" not in batch:
            raise ValueError(f"got a batch with {sorted(batch)}, expected boxes; set derive=boxes")
        return self.encoder.encode_ids(self.tokens(batch["boxes"].to(self.encoder.transformer.norm.weight.device)))

    def tokens(self, boxes: Tensor) -> Tensor:
        """Token ids int64 (B, 3 * max_boxes + 2) of boxes (B, N, 5)."""
        self.check_boxes(boxes)
        corners = (boxes[..., 1:].clamp(0, 1) * (self.cells - 1)).round().long()
        cells = corners[..., 1::2] * self.cells + corners[..., 0::2]
        triples = torch.cat([boxes[..., :1].long(), cells], dim=-1)
        triples = torch.where(boxes[..., :1] < 0, self._nothing, triples)
        ids = torch.full((len(boxes), 3 * self.max_boxes + 2), self._nothing, device=boxes.device)
        ids[:, : 3 * boxes.shape[1]] = triples.flatten(1)
        ids[:, -2:] = torch.tensor([0, self.cells**2 - 1], device=boxes.device)
        return ids

    def check_boxes(self, boxes: Tensor) -> None:
        """Raises ValueError for too many boxes (B, N, 5), or a class that has no token."""
        if boxes.shape[1] > self.max_boxes or (boxes[..., 0] >= self._nothing).any():
            raise ValueError(
                f"got {boxes.shape[1]} boxes with classes up to {boxes[..., 0].max():g}, expected at most "
                f"conditioner.max_boxes={self.max_boxes}, classes below {self._nothing}"
            )

    def null(self, n: int) -> Conditioning:
        """A picture without a box, n times."""
        nothing = torch.full((1, 1, 5), -1.0, device=self.encoder.transformer.norm.weight.device)
        return self({"boxes": nothing}).expand(n)

    def prompt_pair(
        self, prompts: Sequence[str], negatives: Sequence[str], *, image_size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning]:
        """As in `Conditioner`, for prompts that are boxes as json; an empty one has none.

        Raises:
            ValueError: a prompt is no list of boxes.
        """
        return self({"boxes": self._parsed(prompts)}), self({"boxes": self._parsed(negatives)})

    def _parsed(self, prompts: Sequence[str]) -> Tensor:
        boxes = torch.zeros(len(prompts), self.max_boxes, 5)
        boxes[..., 0] = -1
        for row, prompt in enumerate(prompts):
            try:
                found = torch.tensor(json.loads(prompt or "[]"), dtype=torch.float32).reshape(-1, 5)
                boxes[row, : len(found)] = found
            except (ValueError, TypeError, RuntimeError) as error:
                raise ValueError(
                    f"got the prompt {prompt!r}, expected up to {self.max_boxes} boxes as json, as in "
                    "'[[class, left, top, right, bottom]]', places from 0 to 1"
                ) from error
        return boxes
