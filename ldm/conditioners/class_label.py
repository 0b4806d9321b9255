"""Classes: as one learned token (Rombach et al. 2022, class-conditional ImageNet), or as ids that a network embeds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioners.base import Conditioner
from ldm.diffusion import Conditioning
from ldm.nn.arguments import keeps_arguments


class Classes(Conditioner):
    """What conditioners of classes share: labels in, of a batch's column or of prompts such as "207".

    Args:
        num_classes: K; labels are integers in [0, K), and K stands for "no class".
        column: the batch's entry that holds the labels, (B,).
    """

    def __init__(self, num_classes: int, *, column: str) -> None:
        super().__init__()
        self.num_classes, self.column, self.columns = num_classes, column, (column,)
        self.register_buffer("no_class", torch.tensor(num_classes), persistent=False)

    no_class: Tensor

    @abstractmethod
    def told(self, labels: Tensor) -> Conditioning:
        """What the network is told of labels (B,), int64 in [0, K]."""

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """The conditions of batch[column].

        Raises:
            ValueError: the batch has no such column, or a label that is no class.
        """
        if self.column not in batch:
            raise ValueError(
                f"got a batch with {sorted(batch)}, expected {self.column}; set data.columns=[{self.column}]"
            )
        labels = torch.as_tensor(batch[self.column], device=self.no_class.device)
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise ValueError(
                f"got {self.column}={wrong[0].item()}, expected labels from 0 to {self.num_classes - 1}; "
                "set conditioner.num_classes"
            )
        return self.told(labels.long())

    def null(self, n: int) -> Conditioning:
        """That there is no class, n times."""
        return self.told(self.no_class.expand(n))

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
        empty = torch.tensor([not text for text in texts], device=self.no_class.device)
        return known.select(empty, self.null(len(texts)))


class ClassLabel(Classes):
    """A learned embedding a class, and one more for "no class": Conditioning(context (B, 1, width)).

    Args:
        num_classes, column: see `Classes`.
        width: of the embeddings.
    """

    @keeps_arguments
    def __init__(self, num_classes: int, *, width: int, column: str = "class_label") -> None:
        super().__init__(num_classes, column=column)
        self.embedding = nn.Embedding(num_classes + 1, width)

    def told(self, labels: Tensor) -> Conditioning:
        """One token a label."""
        return Conditioning(context=self.embedding(labels)[:, None])


class ClassIds(Classes):
    """The labels themselves, for networks that embed classes (DiT, EDM, ADM): Conditioning(vector (B,) int64).

    Args:
        num_classes, column: see `Classes`; the network's `num_classes` is the same.
    """

    @keeps_arguments
    def __init__(self, num_classes: int, *, column: str = "class_label") -> None:
        super().__init__(num_classes, column=column)

    def told(self, labels: Tensor) -> Conditioning:
        """The labels."""
        return Conditioning(vector=labels)
