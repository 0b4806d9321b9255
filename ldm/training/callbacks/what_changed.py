"""Says, when a run goes on, what is no longer as it was and what follows, and keeps the steps what they were."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

KEY = "made_under"
_PIECES = "accumulated batches"
_SETTINGS = "optimizer settings"
# Of these a change makes another run of it; of all others, other last bits.
_ANOTHER_RUN = ("global batch", _SETTINGS)
# Which kernel an optimizer runs, for which its state was made.
_KERNELS = ("fused", "foreach", "capturable", "differentiable")


class WhatChanged(pl.Callback):
    """Compares processes, device, precision, versions and batch with those under which a checkpoint was made.

    With the same global batch on other processes a run goes on with the same samples and the same noise; sums come in
    another order, and so weights differ in their last bits. `ldm doctor` measures by how much.

    With another number of accumulated batches Lightning, which counts batches, would make the first step of a part of
    its samples: its counters are put right. PyTorch's optimizers take learning rate, weight decay and the like out of
    a checkpoint: they are given those that they were built with.
    """

    def __init__(self) -> None:
        self._then: dict[str, Any] = {}
        self._goes_on = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes what holds now."""
        checkpoint[KEY] = circumstances(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the note until the optimizers are there."""
        self._then, self._goes_on = checkpoint.get(KEY) or {}, True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says what has changed, if anything has, counts in batches of the new size and sets optimizers anew."""
        then, self._then = self._then, {}
        now = circumstances(trainer)
        changed = [name for name in now if name in then and then[name] != now[name]]
        told = [f"{name} {then[name]} -> {now[name]}" for name in changed]
        if self._goes_on and (settings := set_anew(trainer)):
            changed, told = [*changed, _SETTINGS], [*told, *settings]
        self._goes_on = False
        if told:
            rank_zero_warn(f"resume: changed since the checkpoint: {', '.join(told)}; {consequence(changed)}")
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


def set_anew(trainer: pl.Trainer) -> list[str]:
    """Gives restored optimizers the settings that they were built with; returns what differed, in words.

    Several groups of parameters, which may have settings of their own, keep those of the checkpoint.
    """
    told: list[str] = []
    for optimizer in trainer.optimizers:
        if len(optimizer.param_groups) > 1:
            continue
        (group,) = optimizer.param_groups
        for name, value in getattr(optimizer, "defaults", {}).items():
            key = "initial_lr" if name == "lr" and "initial_lr" in group else name
            if name in _KERNELS or key not in group or _plain(group[key]) == _plain(value):
                continue
            told.append(f"{name} of {type(optimizer).__name__} {_plain(group[key])} -> {_plain(value)}")
            if name == "lr":
                group["lr"] = group["lr"] * value / group[key] if group[key] else value
            group[key] = value
    if told:
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, LRScheduler):
                _begin_at(config.scheduler, config.scheduler.optimizer)
    return list(dict.fromkeys(told))  # two optimizers of a kind say the same


def _begin_at(schedule: LRScheduler, optimizer: Optimizer) -> None:
    """Lets a schedule of the learning rate begin at its optimizer's."""
    schedule.base_lrs = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if isinstance(schedule, LambdaLR):
        for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base * factor(schedule.last_epoch)


def _plain(value: Any) -> Any:
    """Lists and tuples alike."""
    return tuple(value) if isinstance(value, list | tuple) else value


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
