"""The exponential moving average of what is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ldm.training.sharding import local

Module = TypeVar("Module", bound=nn.Module)


class EMA(nn.Module, Generic[Module]):
    """A copy of `trained` whose parameters follow it, one update an optimizer step.

    Frozen parameters of `trained` are shared, not copied; buffers are those of the last update. The decay
    rises as (1 + n) / (10 + n) with the number n of updates before, so that short runs average too (after LDM's LitEma,
    whose n counts the update itself).

    Args:
        decay: a step.
        offload: keep the average in the CPU's memory, and on the device only where `on` says so.
        every_n_steps: optimizer steps between updates, each of which then counts for so many; 1 is the published way.

    Attributes:
        module: the averaged copy; use it as it is.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, trained: Module, *, decay: float, offload: bool = False, every_n_steps: int = 1) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"got ema_decay={decay}, expected a number from 0 up to, not including, 1")
        if every_n_steps < 1:
            raise ValueError(f"got ema_every_n_steps={every_n_steps}, expected at least 1")
        self.decay, self.offload, self.every_n_steps = decay, offload, every_n_steps
        self._is_away = offload
        # Offloaded, nothing is shared: what is frozen would go to the device with the rest.
        frozen = {} if offload else {id(p): p for p in trained.parameters() if not p.requires_grad}
        self.module: Module = copy.deepcopy(trained, memo=frozen).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, trained: Module, *, num_updates: int) -> None:
        """Moves the average towards `trained`, which has had num_updates optimizer steps before."""
        if (num_updates + 1) % self.every_n_steps:
            return
        pairs = [
            (local(average.data), local(p.data).to(average.device, average.dtype))
            for average, p in zip(self.module.parameters(), trained.parameters(), strict=True)
            if p.requires_grad
        ]
        torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], self.weight(num_updates))
        for latest, buffer in zip(self.module.buffers(), trained.buffers(), strict=True):
            latest.copy_(buffer)

    def weight(self, num_updates: int) -> float:
        """Of the newest parameters in the average, after num_updates steps before theirs."""
        return 1 - min(self.decay, (1 + num_updates) / (10 + num_updates)) ** self.every_n_steps

    @contextmanager
    def on(self, device: torch.device) -> Iterator[Module]:
        """Has the average on a device for a while, to validate and to sample with."""
        if not self._is_away:
            yield self.module
            return
        home = next(self.module.parameters()).device
        self._is_away = False
        self.module.to(device)
        try:
            yield self.module
        finally:
            self.module.to(home)
            self._is_away = True

    def train(self, mode: bool = True) -> EMA[Module]:
        """Stays in evaluation mode: an average is never trained."""
        return super().train(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> EMA[Module]:
        # An offloaded average stays where it is when the module around it moves.
        return self if self._is_away else super()._apply(fn, recurse)
