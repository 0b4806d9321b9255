"""The exponential moving average of what is trained."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

from ldm.training.sharding import local

Module = TypeVar("Module", bound=nn.Module)


class EMA(nn.Module, Generic[Module]):
    """A copy of `trained` whose parameters follow it, one update an optimizer step.

    Frozen parameters of `trained` are shared, not copied; buffers are those of the last update. The decay
    rises as (1 + n) / (10 + n) with the number n of updates, so that short runs average too (as LDM's LitEma does).

    Attributes:
        module: the averaged copy; use it as it is.
    """

    def __init__(self, trained: Module, *, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"got ema_decay={decay}, expected a number from 0 up to, not including, 1")
        self.decay = decay
        frozen = {id(p): p for p in trained.parameters() if not p.requires_grad}
        self.module: Module = copy.deepcopy(trained, memo=frozen).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, trained: Module, *, num_updates: int) -> None:
        """Moves the average towards `trained`, which has had num_updates optimizer steps before."""
        pairs = [
            (local(average.data), local(p.data).to(average.dtype))
            for average, p in zip(self.module.parameters(), trained.parameters(), strict=True)
            if p.requires_grad
        ]
        torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], self.weight(num_updates))
        for latest, buffer in zip(self.module.buffers(), trained.buffers(), strict=True):
            latest.copy_(buffer)

    def weight(self, num_updates: int) -> float:
        """Of the newest parameters in the average, after num_updates steps before theirs."""
        return 1 - min(self.decay, (1 + num_updates) / (10 + num_updates))

    def train(self, mode: bool = True) -> EMA[Module]:
        """Stays in evaluation mode: an average is never trained."""
        return super().train(False)
