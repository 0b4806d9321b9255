"""What goes by a figure of validation, `val/loss` or `val/fid`: which checkpoint is the best, and when to end.

Lightning's own callbacks look at every validation. A figure of samples is measured at some of them, and what stands
there at the others is missing, or the one before.
"""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl

from ldm.training.callbacks.sample_metrics import SampleMetrics

# Figures that no module logs by itself, as options of conf/callback.
SAMPLED = (
    *("clip_score", "cmmd", "density_coverage", "fd_dinov2", "fid", "inception_score", "kid", "precision_recall"),
    "sfid",
)


class BestCheckpoint(pl.callbacks.ModelCheckpoint):
    """Saves `folder/step=200.ckpt` whenever a figure is better than ever before: the newest there is the best.

    Args:
        folder: where they go; older ones go once two newer ones are there.
        monitor: the figure.
        mode: min or max, whichever is better.

    Raises:
        MisconfigurationException: another mode; at a validation, a figure that is not logged.
        ValueError: when training starts, a figure of samples that nothing measures.
    """

    def __init__(self, folder: str | Path, *, monitor: str = "val/fid", mode: str = "min") -> None:
        super().__init__(folder, "{step}", monitor, mode=mode, save_on_train_epoch_end=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a figure that nothing measures."""
        super().on_train_start(trainer, pl_module)
        check_measured(trainer, str(self.monitor))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves where the figure is new and the best."""
        if is_new(trainer, str(self.monitor)):
            super().on_validation_end(trainer, pl_module)


class StopEarly(pl.callbacks.EarlyStopping):
    """Ends training once a figure was measured `patience` times without being better than before.

    Args:
        monitor: the figure.
        patience: measurements.
        mode: min or max, whichever is better.
        min_delta: by how much better at least.

    Raises:
        MisconfigurationException: another mode.
        RuntimeError: at a validation, a figure that is not logged.
        ValueError: when training starts, a figure of samples that nothing measures.
    """

    def __init__(
        self, *, monitor: str = "val/fid", patience: int = 5, mode: str = "min", min_delta: float = 0.0
    ) -> None:
        super().__init__(monitor, min_delta=min_delta, patience=patience, mode=mode, check_on_train_epoch_end=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a figure that nothing measures."""
        super().on_train_start(trainer, pl_module)
        check_measured(trainer, str(self.monitor))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the figure where it is new."""
        if is_new(trainer, str(self.monitor)):
            super().on_validation_end(trainer, pl_module)


def measuring(trainer: pl.Trainer, name: str) -> list[SampleMetrics]:
    """The callbacks that log a figure."""
    return [one for one in trainer.callbacks if isinstance(one, SampleMetrics) and one.gives(name)]  # type: ignore[attr-defined]


def check_measured(trainer: pl.Trainer, name: str) -> None:
    """Raises ValueError for a figure of samples that no callback measures."""
    metric = name.removeprefix("val/").partition("/")[0]
    if metric in SAMPLED and not measuring(trainer, name):
        raise ValueError(
            f"got monitor={name}, which nothing measures, expected a callback that does; set +callback={metric}, "
            "or another monitor"
        )


def is_new(trainer: pl.Trainer, name: str) -> bool:
    """Whether a figure was measured at this step's validation, rather than left from one before."""
    return all(one.measured_at == trainer.global_step for one in measuring(trainer, name))
