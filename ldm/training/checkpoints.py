"""When checkpoints are saved, which are kept, and how a run stops on Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl

# In a run of several processes they agree on stopping only every so many steps: agreeing waits for the device.
AGREE_EVERY = 10


class Checkpoints(pl.callbacks.Checkpoint):
    """Saves `folder/step=000001234.ckpt` every so many steps and at the end; keeps the newest few.

    Args:
        folder: where the files go.
        every_n_steps: optimizer steps between two of them.
        keep: how many stay; older ones go once a newer one is written.

    Raises:
        ValueError: a count is below 1.
    """

    def __init__(self, folder: str | Path, *, every_n_steps: int = 500, keep: int = 2) -> None:
        for name, count in {"every_n_steps": every_n_steps, "keep": keep}.items():
            if count < 1:
                raise ValueError(f"{name}: got {count}, expected at least 1; leave the callback out to save nothing")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._saved_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts from the step that training begins or goes on at."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves where a multiple of `every_n_steps` was passed; two optimizers pass two steps at once."""
        if trainer.global_step // self.every_n_steps > self._saved_step // self.every_n_steps:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the end."""
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Saves this step unless it is saved, then removes all but the newest; to be called on every rank."""
        if trainer.global_step == self._saved_step:
            return
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step:09d}.ckpt")
        if trainer.is_global_zero:
            for path in sorted(self.folder.glob("step=*.ckpt"))[: -self.keep]:
                path.unlink()


class Stopped(Exception):
    """The user asked training to stop, and what had to be saved is saved."""


class StopOnSignal(pl.callbacks.Checkpoint):
    """On Ctrl-C lets the step under way end, saves a checkpoint and raises `Stopped`; a second Ctrl-C stops at once.

    Lightning's own answer to Ctrl-C drops the step wherever it is and saves nothing. Being a `Checkpoint`, this runs
    after all other callbacks of a step. Processes of a data loader inherit the handler and so outlive the Ctrl-C, which
    a terminal sends to all of them.
    """

    def __init__(self) -> None:
        self.began = False
        self._asked = False
        self._saved = False
        self._previous_step = 0
        self._previous: Mapping[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        self._previous = {signal.SIGINT: signal.signal(signal.SIGINT, self._ask)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether the user asked this process to stop."""
        return self._asked

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on an error is training's own."""
        self.began = True
        self._previous_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves behind an optimizer step, never among gradients that are still being gathered."""
        stepped = trainer.global_step > self._previous_step
        self._previous_step = trainer.global_step
        if not stepped or not self._agreed(trainer):
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.save(trainer)
        self._saved = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops, now that the saved step's metrics are logged.

        Raises:
            Stopped: the user asked for it and the checkpoint is saved.
        """
        if self._saved:
            raise Stopped

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops before a validation rather than after it.

        Raises:
            Stopped: the user asked for it and the checkpoint is saved.
        """
        if self._saved:
            raise Stopped

    def _agreed(self, trainer: pl.Trainer) -> bool:
        if trainer.world_size == 1:
            return self._asked
        if trainer.global_step % AGREE_EVERY:
            return False
        return trainer.strategy.reduce_boolean_decision(self._asked, all=False)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
