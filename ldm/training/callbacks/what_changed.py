"""Says, when a run goes on, what is no longer as it was and what follows, and keeps the steps what they were."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

KEY = "made_under"
_PIECES = "accumulated batches"
# Of these, the samples of a step, a change makes another run of it; of all others, other last bits.
_ANOTHER_RUN = ("global batch",)


class WhatChanged(pl.Callback):
    """Compares processes, device, precision, versions and batch with those under which a checkpoint was made.

    With the same global batch on other processes a run goes on with the same samples and the same noise; sums come in
    another order, and so weights differ in their last bits. `ldm doctor` measures by how much.

    With another number of accumulated batches Lightning, which counts batches, would make the first step of a part of
    its samples: its counters are put right.
    """

    def __init__(self) -> None:
        self._then: dict[str, Any] = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes what holds now."""
        checkpoint[KEY] = circumstances(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the note until the optimizers are there."""
        self._then = checkpoint.get(KEY) or {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says what has changed, if anything has, and counts in batches of the new size."""
        then, self._then = self._then, {}
        now = circumstances(trainer)
        changed = [name for name in now if name in then and then[name] != now[name]]
        if changed:
            told = ", ".join(f"{name} {then[name]} -> {now[name]}" for name in changed)
            rank_zero_warn(f"resume: changed since the checkpoint: {told}; {consequence(changed)}")
        if _PIECES in changed and pl_module.automatic_optimization:
            _recount(trainer, then[_PIECES])


def circumstances(trainer: pl.Trainer) -> dict[str, Any]:
    """What decides whether a run can go on bit for bit, as plain values."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    device, size = trainer.strategy.root_device, getattr(data, "batch_size", None)
    facts = {
        "processes": trainer.world_size,
        "global batch": None if size is None else size * trainer.accumulate_grad_batches,
        _PIECES: trainer.accumulate_grad_batches,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": str(trainer.precision),
        "matmul precision": torch.get_float32_matmul_precision(),
        "optimizer loops": ", ".join(_loops(optimizer) for optimizer in trainer.optimizers),
        "torch": str(torch.__version__),
        "lightning": version("pytorch-lightning"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def consequence(changed: list[str]) -> str:
    """What follows from the changes."""
    if any(name in _ANOTHER_RUN for name in changed):
        return "from here on it is another run than the uninterrupted one"
    return "samples and noise are the same, weights agree to the order of summation, not bit for bit (see ldm doctor)"


def _recount(trainer: pl.Trainer, then: int) -> None:
    """Has batches of which `then` made a step counted as those of which as many as now make one."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    for counts in (progress.total, progress.current):
        under_way = counts.processed - counts.completed
        for name in ("ready", "started", "processed"):
            setattr(counts, name, getattr(counts, name) // then * trainer.accumulate_grad_batches)
        counts.completed = counts.processed - under_way


def _loops(optimizer: torch.optim.Optimizer) -> str:
    """Which of PyTorch's loops over parameters an optimizer runs: they differ in last bits."""
    settings = optimizer.defaults
    return "fused" if settings.get("fused") else "single" if settings.get("foreach") is False else "default"
