"""Two gloo processes of which one goes astray in a different way in each scenario; what `SelfCheck` says of it.

Usage: honesty_worker.py FOLDER, which takes what each rank was told; Lightning starts this file once more.
"""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import tiny_models
import torch
from pytorch_lightning.strategies import DDPStrategy

from ldm.data import ShardDataModule
from ldm.training.callbacks import SelfCheck
from ldm.training.fit import leave_group
from ldm.training.honesty import RanksDisagree


class Astray(pl.Callback):
    """Does something on rank 1 alone, once, before the first batch is looked at."""

    def __init__(self, change: Callable[[pl.Trainer, Any], None]) -> None:
        self.change: Callable[[pl.Trainer, Any], None] | None = change

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and self.change is not None:
            self.change(trainer, pl_module)
            self.change = None


def nothing(trainer: pl.Trainer, module: Any) -> None:
    pass


def weights(trainer: pl.Trainer, module: Any) -> None:
    next(module.trained.denoiser.parameters()).data.view(-1)[0] += 1e-6


def average(trainer: pl.Trainer, module: Any) -> None:
    next(module.ema.module.parameters()).data.view(-1)[0] += 1e-6


def scale(trainer: pl.Trainer, module: Any) -> None:
    # DDP hands out the first rank's buffers before each forward pass, and would hide it.
    module.autoencoder.latent_scale.mul_(1.01)


def scale_later(trainer: pl.Trainer, module: Any) -> None:
    module.on_before_optimizer_step = lambda optimizer: module.autoencoder.latent_scale.mul_(1.01)


def gradients(trainer: pl.Trainer, module: Any) -> None:
    next(module.trained.denoiser.parameters()).register_hook(lambda gradient: gradient * 2)
    # As of a loss outside of DDP's forward: its hooks do not reduce it.
    module.on_after_backward = lambda: next(module.trained.denoiser.parameters()).grad.mul_(3)


class OneForAll(ShardDataModule):
    """Gives every rank the first one's batches."""

    rank = 0


def train(folder: Path, change: Callable[[pl.Trainer, Any], None], data_type: type[ShardDataModule]) -> str:
    """What `SelfCheck` says, or nothing."""
    module = tiny_models.latent_diffusion_module()
    data = data_type(folder / "colours", batch_size=6, resolution=16, seed=3)
    strategy = DDPStrategy(process_group_backend="gloo")
    callbacks = [Astray(change), SelfCheck(num_steps=2)]
    trainer = tiny_models.quiet_trainer(
        max_steps=3, callbacks=callbacks, strategy=strategy, devices=2, limit_val_batches=0
    )
    try:
        trainer.fit(module, data)
    except RanksDisagree as error:
        return str(error)
    return ""


def main() -> None:
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    changes = (nothing, weights, average, scale, scale_later, gradients)
    told = {change.__name__: train(folder, change, ShardDataModule) for change in changes}
    told["samples"] = train(folder, nothing, OneForAll)
    (folder / f"told-{torch.distributed.get_rank()}.json").write_text(json.dumps(told))
    leave_group()


if __name__ == "__main__":
    main()
