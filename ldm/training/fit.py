"""Runs Lightning's training: seeds, resumes, stops on signals, goes back, and tells a wrong setting from a failure."""

from __future__ import annotations

import gc
import logging
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.loggers import Logger, WandbLogger

from ldm.training.callbacks.preemption import StopOnSignal, Stopped
from ldm.training.callbacks.seed_every_batch import SeedEveryBatch
from ldm.training.callbacks.spike_guard import Diverged, RolledBack
from ldm.training.callbacks.unfinished_step import UnfinishedStep
from ldm.training.callbacks.watchdog import Watchdog
from ldm.training.callbacks.what_changed import WhatChanged
from ldm.training.checkpoint_files import Place, StorageError
from ldm.training.honesty import RanksDisagree
from ldm.training.loggers import outlive, outliving
from ldm.training.memory import OutOfMemory, is_out_of_memory
from ldm.training.ranks import meet_anew

Found = TypeVar("Found", bound=pl.Callback)


class SetupError(Exception):
    """Setting up the data, the model or the devices failed before the first step; the cause says why."""


class Preempted(Exception):
    """A signal other than Ctrl-C's stopped training; what had to be saved is saved.

    Args:
        number: the signal.
        requeued: whether the job is back in SLURM's queue.
    """

    def __init__(self, number: signal.Signals, *, requeued: bool) -> None:
        super().__init__(f"stopped by {number.name}")
        self.number, self.requeued = number, requeued


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
    checkpoint: Place | None,
) -> bool:
    """Trains to the end, from a checkpoint if there is one; returns False where Ctrl-C stopped it before.

    A `StopOnSignal` among the callbacks says which other signals stop it; without one, its defaults hold. A `Watchdog`
    watches over ranks. A logger that fails once training has begun, or when a run goes on, is switched off.

    Args:
        make_trainer: called once more for each time that training goes back to a checkpoint.
        config: the run's, for `ConfigInCheckpoint`.

    Raises:
        Preempted: a signal other than Ctrl-C's stopped it.
        Diverged: `SpikeGuard` gave up.
        RanksDisagree: `SelfCheck` found that the ranks do not hold or read what they should.
        StorageError: checkpoints cannot be written.
        OutOfMemory: on a device, or on the host.
        SetupError: something was wrong before the first step.
        OtherRankFailed: a `Watchdog` found that another rank failed, which says so itself.
    """
    quieten()
    meet_anew()
    stop = _one_of(callbacks, StopOnSignal) or StopOnSignal()
    watchdog = _one_of(callbacks, Watchdog)
    goes_on = checkpoint is not None
    outlive(loggers, begun=lambda: stop.began or goes_on)
    # The watchdog first, so that the other ranks learn of an error before anything else is done about it.
    every = [*([watchdog] if watchdog else []), *(one for one in callbacks if one not in (stop, watchdog))]
    every += [ConfigInCheckpoint(config), SeedEveryBatch(config.get("seed") or 0), WhatChanged()]
    every += [UnfinishedStep(loggers), stop]

    def trainer() -> pl.Trainer:
        made = make_trainer(callbacks=list(every), logger=list(loggers))
        if watchdog:
            watchdog.follow(made)
        return made

    with stop, watchdog.watching() if watchdog else nullcontext(), _closing(loggers, stop), _telling_apart(stop, model):
        _train(trainer, model, data, checkpoint)
        return True
    if stop.asked in (None, signal.SIGINT):
        return False
    raise Preempted(stop.asked, requeued=stop.put_back())


def _train(
    make_trainer: Callable[[], pl.Trainer],
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    checkpoint: Place | None,
) -> None:
    """Trains to the end, anew with another trainer each time that training goes back to a checkpoint."""
    while True:
        trainer = make_trainer()
        try:
            trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
            return
        except RolledBack as back:
            checkpoint = back.checkpoint
        # The replaced strategy's hooks on the model go with it.
        del trainer
        gc.collect()


@contextmanager
def _telling_apart(stop: StopOnSignal, model: pl.LightningModule) -> Iterator[None]:
    """Says what an error means; lets a stop that was asked for pass."""
    try:
        yield
    except Stopped:
        leave_group()
    except SystemExit:
        # How Lightning ends on a KeyboardInterrupt: here, the second signal.
        if not stop.asked:
            raise
    except (Diverged, RanksDisagree, StorageError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"out of memory at step {model.global_step}: {error}".splitlines()[0]) from error
        if stop.began:
            raise
        raise SetupError(str(error)) from error


@contextmanager
def _closing(loggers: Sequence[Logger], stop: StopOnSignal) -> Iterator[None]:
    """Ends W&B's run: it is one of a process, so that the next job of a sweep would go on in it."""
    try:
        yield
    finally:
        for logger in loggers:
            if stop.began and isinstance(logger, WandbLogger):
                with outliving(logger):
                    logger.experiment.finish()


def _one_of(callbacks: Sequence[pl.Callback], kind: type[Found]) -> Found | None:
    return next((one for one in callbacks if isinstance(one, kind)), None)


def leave_group() -> None:
    """Ends the group of processes that trained together, so that what one of them does alone waits for nobody.

    A process that exits with the group's threads still running may also abort.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def quieten() -> None:
    """Hides what Lightning says about every run and nobody acts on."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*have no `val_dataloader`.*",
        ".*is not resumable.*",
        ".*module\\(s\\) in eval mode.*",
        ".*`IterableDataset` has `__len__` defined.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*[Cc]heckpoint directory .* exists and is not empty.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)
