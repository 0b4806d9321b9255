"""Faults of one rank in two processes that talk through gloo; Lightning starts this file once more for the second.

Usage: fault_worker.py FOLDER SCENARIO..., which holds the shards `colours` and takes what each rank ends with.
"""

import math
import os
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import tiny_models
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from ldm.data import ShardDataModule
from ldm.training.callbacks import SpikeGuard
from ldm.training.checkpoint_folders import newest_valid
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.checkpoints import Checkpoints
from ldm.training.fit import Preempted, fit, leave_group
from ldm.training.loggers import MetricsCSV

STEPS = 12
PATIENT: dict[str, Any] = {"policy": "rollback", "patience": 2, "read_every": 2}


def broken_on_one_rank(model: Any, steps: range) -> Any:
    """Makes the loss of some steps not a number, on rank 1 alone."""
    clean = model.loss

    def loss(*args: Any) -> Tensor:
        broken = model.global_rank == 1 and model.trainer.global_step in steps
        return clean(*args) * (math.nan if broken else 1.0)

    model.loss = loss
    return model


def signalled_on_one_rank(model: Any, step: int) -> Any:
    """Sends rank 1 alone a SIGTERM in the middle of a step."""
    clean = model.loss

    def loss(*args: Any) -> Tensor:
        if model.global_rank == 1 and model.trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
            model.signalled_at = time.monotonic()
        return clean(*args)

    model.loss = loss
    return model


def train(model: pl.LightningModule, folder: Path, *, colours: Path, **guard: Any) -> int:
    """Trains, from the newest checkpoint of the folder; returns the signal that stopped it, or 0."""

    def trainer(*, callbacks: list[pl.Callback], logger: list[Any]) -> pl.Trainer:
        return tiny_models.quiet_trainer(
            max_steps=STEPS,
            callbacks=callbacks,
            strategy=DDPStrategy(process_group_backend="gloo"),
            devices=2,
            plugins=[AtomicCheckpointIO()],
            limit_val_batches=0,
            log_every_n_steps=1,
            logger=logger,
            enable_checkpointing=True,
        )

    callbacks = [SpikeGuard(folder / "skipped.jsonl", **guard), Checkpoints(folder / "checkpoints", every_n_steps=4)]
    data = ShardDataModule(colours, colours, batch_size=6, resolution=16, seed=3)
    checkpoint = newest_valid(folder / "checkpoints")
    try:
        loggers = [MetricsCSV(folder)]
        fit(trainer, model, data=data, config={}, callbacks=callbacks, loggers=loggers, checkpoint=checkpoint)
    except Preempted as stop:
        return int(stop.number)
    return 0


def main() -> None:
    warnings.simplefilter("ignore")
    folder, scenarios = Path(sys.argv[1]), sys.argv[2:]
    make = partial(tiny_models.latent_diffusion_module, optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=True))
    runs: dict[str, Any] = {
        "clean": lambda: (make(), "clean", {}),
        "broken": lambda: (broken_on_one_rank(make(), range(5, 6)), "broken", {}),
        "rollback": lambda: (broken_on_one_rank(make(), range(9, 11)), "rollback", PATIENT),
        "stopped": lambda: (signalled_on_one_rank(make(), 2), "stopped", {}),
        "resumed": lambda: (make(), "stopped", {}),
        "autoencoder clean": lambda: (tiny_models.autoencoder_module(), "autoencoder clean", {}),
        "autoencoder stopped": lambda: (
            signalled_on_one_rank(tiny_models.autoencoder_module(), 2),
            "autoencoder stopped",
            {},
        ),
        "autoencoder resumed": lambda: (tiny_models.autoencoder_module(), "autoencoder stopped", {}),
    }
    for scenario in scenarios:
        model, name, guard = runs[scenario]()
        number = train(model, folder / name, colours=folder / "colours", **guard)
        seconds = time.monotonic() - model.signalled_at if hasattr(model, "signalled_at") else 0.0
        facts = {"signal": number, "step": model.trainer.global_step, "seconds": seconds}
        weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
        torch.save({"facts": facts, "weights": weights}, folder / f"{scenario}-{model.global_rank}.pt")
    leave_group()


if __name__ == "__main__":
    main()
