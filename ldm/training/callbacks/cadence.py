"""When callbacks act, and how the time that they take stays out of the throughput."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytorch_lightning as pl

from ldm.training.callbacks.throughput import Throughput
from ldm.training.callbacks.watchdog import Watchdog


class Cadence:
    """Due once each time that training passes a multiple of so many steps.

    Passing counts, not hitting: two optimizers, or a validation that falls between, may step over a multiple.

    Args:
        every_n_steps: optimizer steps between two times.

    Raises:
        ValueError: fewer than one step.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"got every_n_steps={every_n_steps}, expected at least 1; leave the callback out instead")
        self.every_n_steps = every_n_steps
        self.last_step = 0

    def start(self, step: int) -> None:
        """Counts from the step that training begins or goes on at."""
        self.last_step = step

    def due(self, step: int) -> bool:
        """Whether a multiple was passed since the last time; if so, this is the last time now."""
        if step // self.every_n_steps <= self.last_step // self.every_n_steps:
            return False
        self.last_step = step
        return True


@contextmanager
def outside_training(trainer: pl.Trainer) -> Iterator[None]:
    """Keeps what happens inside out of the times that `Throughput` reports, and `Watchdog` from ending it."""
    with ExitStack() as patience:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Watchdog):
                patience.enter_context(callback.patient())
        yield
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Throughput):
            callback.leave_out_gap()
