"""Several text encoders one after another, as in Stable Diffusion 3 (Esser et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioners.base import Conditioner
from ldm.conditioners.combined import Combined, join
from ldm.diffusion import Conditioning
from ldm.nn.arguments import keeps_arguments


class Stacked(Combined):
    """What each part says, as one: contexts joined on tokens, narrow ones filled up with zeros, vectors on width.

    Where one part has a mask, the tokens of those without are all real.

    Args:
        conditioners: the parts; each has a context.
    """

    @keeps_arguments
    def __init__(self, conditioners: Sequence[Conditioner]) -> None:
        super().__init__(conditioners)

    def joined(self, conditions: Sequence[Conditioning]) -> Conditioning:
        """One Conditioning from those of the parts for the same B samples.

        Raises:
            ValueError: a part without a context.
        """
        contexts = [condition.context for condition in conditions]
        if any(context is None for context in contexts):
            raise ValueError("got a part without a context, expected one of each; use Combined for the others")
        found: list[Tensor] = [context for context in contexts if context is not None]
        width = max(context.shape[2] for context in found)
        rest = join([Conditioning(vector=condition.vector, concat=condition.concat) for condition in conditions])
        return Conditioning(
            context=torch.cat([F.pad(context, (0, width - context.shape[2])) for context in found], dim=1),
            mask=_masks(conditions, found),
            vector=rest.vector,
            concat=rest.concat,
        )


def _masks(conditions: Sequence[Conditioning], contexts: Sequence[Tensor]) -> Tensor | None:
    masks = [condition.mask for condition in conditions]
    if all(mask is None for mask in masks):
        return None
    whole = [context.new_ones(context.shape[:2], dtype=torch.bool) for context in contexts]
    return torch.cat([own if mask is None else mask for mask, own in zip(masks, whole, strict=True)], dim=1)
