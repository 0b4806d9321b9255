"""Several conditioners side by side, as in SDXL (Podell et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioners.base import Conditioner
from ldm.diffusion import Conditioning
from ldm.nn.arguments import keeps_arguments


class Combined(Conditioner):
    """What each part says, as one: contexts joined on their width, vectors on theirs, in the order of the parts.

    Args:
        conditioners: the parts; those with a context agree on its length, and at most one gives a concat.
    """

    @keeps_arguments
    def __init__(self, conditioners: Sequence[Conditioner]) -> None:
        super().__init__()
        if not conditioners:
            raise ValueError("got no conditioners, expected at least one; Unconditional says nothing on purpose")
        self.conditioners = nn.ModuleList(conditioners)
        self.columns = tuple(dict.fromkeys(column for part in conditioners for column in part.columns))
        self.always_told = tuple(dict.fromkeys(name for part in conditioners for name in part.always_told))

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """Every part's condition of the batch, joined."""
        return self._of_each(lambda part: part(batch))

    def pictures(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Every part's pictures."""
        return {name: picture for part in self._parts() for name, picture in part.pictures(batch).items()}

    def null(self, n: int) -> Conditioning:
        """Every part's null condition, joined."""
        return self._of_each(lambda part: part.null(n))

    def prompt_pair(
        self, prompts: Sequence[str], negatives: Sequence[str], *, image_size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning]:
        """Every part's pair, joined."""
        pairs = [part.prompt_pair(prompts, negatives, image_size=image_size) for part in self._parts()]
        return self.joined([cond for cond, _ in pairs]), self.joined([uncond for _, uncond in pairs])

    def joined(self, conditions: Sequence[Conditioning]) -> Conditioning:
        """What the parts say of the same B samples, as one: see `join`."""
        return join(conditions)

    def num_chunks(self, text: str) -> int:
        """That of the part that reads the prompt in most chunks."""
        return max(part.num_chunks(text) for part in self._parts())

    def _parts(self) -> list[Conditioner]:
        return list(self.conditioners)  # type: ignore[arg-type]

    def _of_each(self, function: Callable[[Conditioner], Conditioning]) -> Conditioning:
        return self.joined([function(part) for part in self._parts()])


def join(conditions: Sequence[Conditioning]) -> Conditioning:
    """One Conditioning from those of several parts for the same B samples.

    Raises:
        ValueError: contexts of different lengths or masks, class ids beside vectors, or more than one concat.
    """
    contexts = [condition for condition in conditions if condition.context is not None]
    lengths = {len(c.context[0]) for c in contexts if c.context is not None}
    masks = [c.mask for c in contexts]
    if len(lengths) > 1:
        raise ValueError(f"got contexts of {sorted(lengths)} tokens, expected one length: give the parts one tokenizer")
    if any(not _same(mask, masks[0]) for mask in masks):
        raise ValueError("got contexts with different masks, expected one mask: give the parts one tokenizer")
    vectors = [c.vector for c in conditions if c.vector is not None]
    if len(vectors) > 1 and any(vector.dim() != 2 for vector in vectors):
        raise ValueError("got class ids beside other vectors, expected vectors (B, D); embed the classes as context")
    concats = [c.concat for c in conditions if c.concat is not None]
    if len(concats) > 1:
        raise ValueError(f"got {len(concats)} parts with a concat condition, expected at most one")
    return Conditioning(
        context=_cat([c.context for c in contexts if c.context is not None]),
        mask=masks[0] if masks else None,
        vector=_cat(vectors),
        concat=concats[0] if concats else None,
    )


def _cat(parts: Sequence[Tensor]) -> Tensor | None:
    return torch.cat(list(parts), dim=-1) if parts else None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or torch.equal(a, b)
