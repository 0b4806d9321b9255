"""Class labels as one-token context (Rombach et al. 2022, class-conditional ImageNet)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ldm.conditioners.base import Conditioner
from ldm.diffusion import Conditioning
from ldm.nn.arguments import keeps_arguments


class ClassLabel(Conditioner):
    """A learned embedding a class, and one more for "no class": Conditioning(context (B, 1, width)).

    Args:
        column: the batch's entry that holds the labels, (B,) integers in [0, num_classes).
    """

    @keeps_arguments
    def __init__(self, num_classes: int, *, width: int, column: str = "class_label") -> None:
        super().__init__()
        self.num_classes, self.column, self.columns = num_classes, column, (column,)
        self.embedding = nn.Embedding(num_classes + 1, width)

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """Embeds batch[column].

        Raises:
            ValueError: the batch has no such column, or a label that is no class.
        """
        if self.column not in batch:
            raise ValueError(
                f"got a batch with {sorted(batch)}, expected {self.column}; set data.columns=[{self.column}]"
            )
        labels = torch.as_tensor(batch[self.column], device=self.embedding.weight.device)
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise ValueError(
                f"got {self.column}={wrong[0].item()}, expected labels from 0 to {self.num_classes - 1}; "
                "set conditioner.num_classes"
            )
        return Conditioning(context=self.embedding(labels)[:, None])

    def null(self, n: int) -> Conditioning:
        """The embedding of "no class", n times."""
        return Conditioning(context=self.embedding.weight[-1].expand(n, 1, -1))

    def prompt_pair(
        self, prompts: Sequence[str], negatives: Sequence[str], *, image_size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning]:
        """As in `Conditioner`, for prompts that are classes by number, such as "207"; an empty one is "no class".

        Raises:
            ValueError: a prompt is no class.
        """
        return self._of_prompts(prompts), self._of_prompts(negatives)

    def _of_prompts(self, prompts: Sequence[str]) -> Conditioning:
        texts = [prompt.strip() for prompt in prompts]
        if wrong := next((text for text in texts if text and not text.isdecimal()), None):
            raise ValueError(
                f"got the prompt {wrong!r}, expected a class by number, 0 to {self.num_classes - 1}: this model knows "
                "classes, not words"
            )
        known = self({self.column: torch.tensor([int(text or 0) for text in texts])})
        empty = torch.tensor([not text for text in texts], device=self.embedding.weight.device)
        return known.select(empty, self.null(len(texts)))
