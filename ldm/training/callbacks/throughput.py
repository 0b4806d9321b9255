"""How fast training is, and what it waits for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.throughput import get_available_flops
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

# What matrix products are computed in, by the trainer's precision.
COMPUTE_TYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32}


def num_images(batch: Mapping[str, Any]) -> int:
    """Samples in a batch: the length of its first tensor."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


class Throughput(pl.Callback):
    """Logs images/s (of all devices), seconds a step, the share of time between steps, and model FLOPs utilisation.

    The time between two steps is spent on loading, moving and logging; where it is more than a few per cent, data is
    the bottleneck. Validation, checkpoints and sampling are left out of all figures. Measured on the host over each
    logging interval, without waiting for the device, so it costs nothing.

    Utilisation is the arithmetic of one training step (counted once, at the first step) over what the device could
    do at its peak. It is left out where the peak is not known, as on CPUs.

    Args:
        device_peak_flops: FLOP/s of one device; None asks Lightning's table of GPUs.
    """

    def __init__(self, *, device_peak_flops: float | None = None) -> None:
        self.device_peak_flops = device_peak_flops
        self._flops_per_batch: int | None = None
        self._every_n_steps = 1
        self._counter: FlopCounterMode | None = None
        self._gap_start: float | None = None
        self._gap_counts = True
        self._restart(0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the device's peak and starts the first interval."""
        if self.device_peak_flops is None:
            precision = str(trainer.precision).split("-")[0]
            compute_type = COMPUTE_TYPES.get(precision, torch.float32)
            self.device_peak_flops = get_available_flops(pl_module.device, compute_type)
        self._every_n_steps = trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._gap_start = None
        self._restart(trainer.global_step, time.perf_counter())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends the gap between two steps."""
        now = time.perf_counter()
        gap = now - self._gap_start if self._gap_start is not None else 0.0
        if self._gap_counts:
            self._waited += gap
        else:
            self._left_out += gap
        self._gap_counts = True
        if self.device_peak_flops is not None and self._flops_per_batch is None:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch and, at the end of a logging interval, reports."""
        now = time.perf_counter()
        self._gap_start = now
        if self._counter is not None:
            self._stop_counting()
            # The counted step was slowed by the counting: time starts after it.
            self._restart(trainer.global_step, now)
            return
        self._images += num_images(batch) * trainer.world_size
        self._batches += 1
        num_steps = trainer.global_step - self._first_step
        if num_steps > 0 and trainer.global_step % self._every_n_steps == 0:
            self._report(trainer, num_steps, now - self._start - self._left_out)
            self._restart(trainer.global_step, now)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is no waiting."""
        self.leave_out_gap()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Nor is saving."""
        self.leave_out_gap()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves no counting behind."""
        if self._counter is not None:
            self._stop_counting()

    def leave_out_gap(self) -> None:
        """Keeps the time until the next step out of all figures."""
        self._gap_counts = False

    def _stop_counting(self) -> None:
        assert self._counter is not None
        self._counter.__exit__(None, None, None)
        self._flops_per_batch = self._counter.get_total_flops()
        self._counter = None

    def _restart(self, step: int, now: float) -> None:
        self._first_step, self._start = step, now
        self._images = self._batches = 0
        self._waited = self._left_out = 0.0

    def _report(self, trainer: pl.Trainer, num_steps: int, seconds: float) -> None:
        figures = {
            "throughput/images_per_second": self._images / seconds,
            "throughput/step_seconds": seconds / num_steps,
            "throughput/data_wait_share": self._waited / seconds,
        }
        if self._flops_per_batch is not None and self.device_peak_flops is not None:
            achieved = self._flops_per_batch * self._batches / seconds
            figures["throughput/model_flops_utilisation"] = achieved / self.device_peak_flops
        for logger in trainer.loggers:
            # Lightning logs the losses of this step under its index, which counts from zero.
            logger.log_metrics(figures, step=trainer.global_step - 1)
