"""What a kill cuts off a step whose checkpoint is there already: its row in the log and its validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger

from ldm.training.loggers import MetricsCSV

KEY = "unfinished_step"


class UnfinishedStep(pl.Callback):
    """Makes metrics.csv of a killed and resumed run the uninterrupted one's, row by row.

    A checkpoint is saved at the end of a step, before Lightning logs the step's row and validates. So each checkpoint
    says how far metrics.csv had come, which row is still to be written, and whether a validation is due; on resuming,
    later rows go, that row is written and that validation runs, before anything else. Lightning would leave both out.

    Args:
        loggers: the run's; of them `MetricsCSV` goes back to the checkpoint's state, others only go on.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._csv = next((logger for logger in loggers if isinstance(logger, MetricsCSV)), None)
        self._found: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Puts what is left of the step before training; where no further step is left, no other hook is called."""
        trainer.fit_loop.run = _after(self._finish, trainer.fit_loop.run, trainer)  # type: ignore[method-assign]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the next epoch where the saved step was the last of one, which Lightning closes without that."""
        loop: Any = trainer.fit_loop
        if loop.restarted_mid_epoch and loop.epoch_progress.current.ready == loop.epoch_progress.current.processed:
            loop.reset_restart_stage()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes what comes after this checkpoint in the same step."""
        checkpoint[KEY] = {
            "csv": self._csv.state_dict() if self._csv is not None else None,
            "row": _due_row(trainer),
            "step": trainer.fit_loop.epoch_loop._batches_that_stepped,
            "validate": _in_step(trainer) and _validation_is_due(trainer),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the note until the trainer's own state is there."""
        self._found = checkpoint.get(KEY) or {}

    def _finish(self, trainer: pl.Trainer) -> None:
        found, self._found = self._found, {}
        if not found:
            return
        if trainer.is_global_zero and self._csv is not None and found["csv"] is not None:
            self._take_up(found)
        if found["validate"] and trainer.enable_validation:
            _validate(trainer)

    def _take_up(self, found: dict[str, Any]) -> None:
        assert self._csv is not None
        if self._csv.load_state_dict(found["csv"]) and found["row"]:
            self._csv.log_metrics(found["row"], step=found["step"])


def _after(first: Callable[[pl.Trainer], None], run: Callable[[], None], trainer: pl.Trainer) -> Callable[[], None]:
    def both() -> None:
        first(trainer)
        run()

    return both


def _in_step(trainer: pl.Trainer) -> bool:
    """Whether a batch is done whose row and validation are still to come."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.processed > progress.completed)


def _due_row(trainer: pl.Trainer) -> dict[str, float]:
    """What Lightning is about to log for this step."""
    logs = trainer._logger_connector
    if not _in_step(trainer) or not logs.should_update_logs or not trainer.loggers:
        return {}
    metrics = {name: float(value) for name, value in logs.metrics["log"].items()}
    return {**metrics, "epoch": trainer.current_epoch} if metrics else {}


def _validation_is_due(trainer: pl.Trainer) -> bool:
    """As Lightning decides it; validations by the clock are nobody's to repeat."""
    loop, by_the_clock = trainer.fit_loop, getattr(trainer, "_val_check_time_interval", None) is not None
    if not trainer.enable_validation or loop._data_fetcher is None or by_the_clock:
        return False
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def _validate(trainer: pl.Trainer) -> None:
    """Validates as between two steps, with the counters of the saved one."""
    loop, logs = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    loop.restarting = False
    trainer.validating = True
    try:
        loop.run()
    finally:
        trainer.training = True
        logs._first_loop_iter = None
