"""Runs Lightning's training: seeds, resumes, stops on Ctrl-C, and tells a wrong setting from a failure."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.loggers import Logger, WandbLogger

from ldm.training.checkpoints import StopOnSignal, Stopped


class SetupError(Exception):
    """Setting up the data, the model or the devices failed before the first step; the cause says why."""


class ConfigInCheckpoint(pl.Callback):
    """Puts the run's config into every checkpoint, so that one rebuilds by itself.

    Args:
        config: plain, resolved, without credentials.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the key "config"."""
        checkpoint["config"] = self.config


class TrainerFactory(Protocol):
    """`pytorch_lightning.Trainer` with all of its plain settings bound."""

    def __call__(self, *, callbacks: list[pl.Callback], logger: list[Logger]) -> pl.Trainer: ...


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch, in this process and in the data loader's."""
    pl.seed_everything(seed, workers=True, verbose=False)


def fit(
    make_trainer: TrainerFactory,
    model: pl.LightningModule,
    *,
    data: pl.LightningDataModule,
    config: dict[str, Any],
    callbacks: Sequence[pl.Callback],
    loggers: Sequence[Logger],
    checkpoint: Path | None,
) -> bool:
    """Trains to the end, from a checkpoint if there is one; returns False where the user stopped it before.

    Args:
        config: the run's, for `ConfigInCheckpoint`.

    Raises:
        SetupError: something was wrong before the first step.
    """
    _quieten()
    stop = StopOnSignal()
    with stop:
        try:
            trainer = make_trainer(callbacks=[*callbacks, ConfigInCheckpoint(config), stop], logger=list(loggers))
            trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        except Stopped:
            leave_group()
            return False
        except SystemExit:
            # How Lightning ends on a KeyboardInterrupt: here, a second Ctrl-C.
            if stop.asked:
                return False
            raise
        except Exception as error:
            if stop.began:
                raise
            raise SetupError(str(error)) from error
        finally:
            _close(loggers, began=stop.began)
    return True


def _close(loggers: Sequence[Logger], *, began: bool) -> None:
    """Ends W&B's run: it is one of a process, so that the next job of a sweep would go on in it."""
    for logger in loggers:
        if began and isinstance(logger, WandbLogger):
            logger.experiment.finish()


def leave_group() -> None:
    """Ends the group of processes that trained together, so that what one of them does alone waits for nobody.

    A process that exits with the group's threads still running may also abort.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _quieten() -> None:
    """Hides what Lightning says about every run and nobody acts on."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*is not resumable.*",
        ".*module\\(s\\) in eval mode.*",
        ".*`IterableDataset` has `__len__` defined.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*[Cc]heckpoint directory .* exists and is not empty.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)
