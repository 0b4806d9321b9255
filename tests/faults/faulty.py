"""A tiny latent-diffusion experiment in which things go wrong as told, once or each time."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger

from ldm.networks import UNet

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[1] / "training"))
import tiny_models


class Fault(pl.Callback):
    """Does something to this process at a step.

    Args:
        kind: what: see `_strike`.
        at: the step in which, or None for never.
        rank: on which, or None for all.
        once: a file that is written first; where it is there already, nothing happens.
        pace: seconds that every step waits.
        where: "training", "validation" or "start", which is before the first step.
    """

    def __init__(
        self,
        *,
        kind: str = "",
        at: int | None = None,
        rank: int | None = None,
        once: str | None = None,
        pace: float = 0,
        where: str = "training",
    ) -> None:
        self.kind, self.at, self.rank, self.pace, self.where = kind, at, rank, pace, where
        self.once = None if once is None else Path(once)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.where == "start":
            self._come(trainer)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        time.sleep(self.pace)
        if self.where == "training":
            self._come(trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.where == "validation":
            self._come(trainer)

    def _come(self, trainer: pl.Trainer) -> None:
        if trainer.global_step != self.at or self.rank not in (None, trainer.global_rank):
            return
        if self.once is not None:
            if self.once.exists():
                return
            self.once.write_text(str(time.time()))
        self._strike()

    def _strike(self) -> None:
        if self.kind == "raise":
            raise KeyError("a step went wrong")
        if self.kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if self.kind == "allocation":
            torch.empty(2**50)
        if self.kind == "hang":
            time.sleep(1000)
        elif self.kind == "hold":  # without ever giving another thread a turn
            ctypes.PyDLL(None).sleep(1000)
        else:
            os.kill(os.getpid(), signal.Signals[self.kind])


class Spoil(pl.Callback):
    """Multiplies the loss of some steps, or makes a gradient of theirs no number.

    Args:
        steps: which; what is done to them does not depend on a resume.
        factor: NaN and infinity too.
        rank: on which, or None for all.
        gradient: spoils a gradient and leaves the loss alone.
    """

    def __init__(
        self, *, steps: list[int], factor: float | str = math.nan, rank: int | None = None, gradient: bool = False
    ) -> None:
        self.steps, self.factor, self.rank, self.gradient = set(steps), float(factor), rank, gradient

    def _due(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step in self.steps and self.rank in (None, trainer.global_rank)

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        clean = pl_module.loss

        def loss(*args: Any) -> torch.Tensor:
            spoiled = self._due(trainer) and not self.gradient
            return clean(*args) * (self.factor if spoiled else 1.0)

        pl_module.loss = loss

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.gradient and self._due(trainer):
            next(p for p in pl_module.parameters() if p.grad is not None).grad.view(-1)[0] = self.factor


class Seen(pl.Callback):
    """Writes each step's samples, and at the end a digest of everything that was trained, into a folder.

    Args:
        folder: takes `rank=N.txt`, a line a step, and `end-rank=N.pt`.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank={trainer.global_rank}.txt").open("a") as file:
            samples = list(zip(batch["position"].tolist(), batch["index"].tolist(), strict=True))
            file.write(f"{trainer.global_step} {samples}\n")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        for number, optimizer in enumerate(trainer.optimizers):
            for key, moments in optimizer.state_dict()["state"].items():
                state |= {f"optimizer{number}.{key}.{name}": value for name, value in moments.items()}
        torch.save(state, self.folder / f"end-rank={trainer.global_rank}.pt")


def module(
    *, learning_rate: float = 1e-3, channels: int = 8, optimizer: str = "adamw", **options: Any
) -> pl.LightningModule:
    """`tiny_models.latent_diffusion_module` with a fused optimizer, adamw or sgd, of so many channels."""
    denoiser = tiny_models.tiny_denoiser()
    if channels != 8:
        arguments = {"channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2], "num_heads": 2}
        denoiser.network = UNet(4, 4, model_channels=channels, context_dim=8, norm_groups=4, **arguments)
    kinds = {"adamw": partial(torch.optim.AdamW, lr=learning_rate, fused=True)}
    kinds["sgd"] = partial(torch.optim.SGD, lr=50 * learning_rate, momentum=0.9, fused=True)
    return tiny_models.latent_diffusion_module(denoiser=denoiser, optimizer=kinds[optimizer], **options)


class BrokenLogger(Logger):
    """Takes some rows, and then raises for ever, as one whose service is gone."""

    def __init__(self, *, after: int) -> None:
        super().__init__()
        self.left = after

    name = version = "broken"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("the service is gone")
