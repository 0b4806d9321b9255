"""When checkpoints are saved, and which are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ldm.training.checkpoint_folders import SPARE, check_space, check_writable, child, find
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.frozen import drop_frozen


class Checkpoints(pl.callbacks.Checkpoint):
    """Saves `folder/step=000001234.ckpt` every so many steps and at the end; keeps the newest few.

    Args:
        folder: where they go: a folder here, or an address that fsspec knows (`s3://...`).
        every_n_steps: optimizer steps between two of them.
        keep: how many stay; older ones go once a newer one is written and verified.

    Raises:
        ValueError: a count is too small.
    """

    def __init__(self, folder: str | Path, *, every_n_steps: int = 500, keep: int = 2) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"every_n_steps: got {every_n_steps}, expected at least 1; leave the callback out to save nothing"
            )
        if keep < SPARE:
            raise ValueError(f"keep: got {keep}, expected at least {SPARE}, so that a damaged one leaves another")
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._saved_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts from the step that training begins or goes on at, and looks at the disk before hours are spent.

        Raises:
            StorageError: the folder cannot be written to, or has no room for two checkpoints.
        """
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            check_writable(self.folder)
            check_space(self.folder, int(2.2 * _expected_bytes(pl_module)))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves where a multiple of `every_n_steps` was passed; two optimizers pass two steps at once.

        Raises:
            StorageError: this save, or one that was under way, failed.
        """
        poll(trainer)
        if trainer.global_step // self.every_n_steps > self._saved_step // self.every_n_steps:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the end, and waits until it is safe."""
        self.save(trainer)
        join(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lets a save under way end; its own failure does not hide the exception."""
        try:
            join(trainer)
        except Exception as error:
            exception.add_note(f"and while the last checkpoint was saved: {error}")

    def save(self, trainer: pl.Trainer) -> None:
        """Saves this step unless it is saved, then removes all but the newest; to be called on every rank."""
        if trainer.global_step == self._saved_step:
            return
        self._saved_step = trainer.global_step
        place = child(self.folder, f"step={trainer.global_step:09d}.ckpt")
        trainer.save_checkpoint(place)
        if trainer.is_global_zero:
            # Where saving goes on in the background, the new one is not there yet.
            older = [other for other in find(self.folder) if Path(str(other)).name != Path(str(place)).name]
            for other in reversed(older[self.keep - 1 :]):
                trainer.strategy.remove_checkpoint(other)


def poll(trainer: pl.Trainer) -> None:
    """Raises what has gone wrong with saving in the background."""
    if isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
        trainer.strategy.checkpoint_io.poll()


def join(trainer: pl.Trainer) -> None:
    """Waits until what is being saved in the background is safe; raises what has gone wrong with it."""
    if isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
        trainer.strategy.checkpoint_io.join()


def _expected_bytes(module: pl.LightningModule) -> int:
    """What a checkpoint will take: the state that is not frozen, and Adam's two moments."""
    trained = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    kept = drop_frozen(module, dict(module.named_parameters()))
    return sum(parameter.nbytes for parameter in kept.values()) + 2 * trained
