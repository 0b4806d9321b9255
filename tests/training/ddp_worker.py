"""Trains the modules in two processes that talk through gloo; Lightning starts this file once more for the second.

Usage: ddp_worker.py FOLDER, which holds the shards `colours` and takes what each rank ends with.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import tiny_models
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from ldm.data import ShardDataModule
from ldm.training.fit import leave_group
from ldm.training.latent_scale import measure_latent_scale

# Not Adam: it turns the rounding errors of gradients that are zero, as those of key biases are, into whole steps.
sgd = partial(torch.optim.SGD, momentum=0.9)
MODULES = {
    "latent_diffusion": partial(tiny_models.latent_diffusion_module, optimizer=partial(sgd, lr=0.1)),
    "autoencoder": partial(
        tiny_models.autoencoder_module, optimizer=partial(sgd, lr=1e-5), discriminator_optimizer=partial(sgd, lr=1e-3)
    ),
    "vq_autoencoder": partial(
        tiny_models.vq_autoencoder_module,
        optimizer=partial(sgd, lr=1e-2),
        discriminator_optimizer=partial(sgd, lr=1e-3),
    ),
}


def train(module: pl.LightningModule, folder: Path, **trainer_options: Any) -> dict[str, dict[str, Tensor]]:
    """The weights after four steps on global batches of six, their validation, and an autoencoder's scale."""
    data = ShardDataModule(folder / "colours", folder / "colours", batch_size=6, resolution=16, seed=3)
    trainer = tiny_models.quiet_trainer(max_steps=4, **trainer_options)
    trainer.fit(module, data)
    weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
    numbers = trainer.validate(module, data, verbose=False)[0]
    if hasattr(module, "discriminator"):
        numbers["shift"], numbers["scale"] = measure_latent_scale(module.autoencoder, data)
    return {"weights": weights, "numbers": {name: torch.tensor(value) for name, value in numbers.items()}}


def main() -> None:
    folder = Path(sys.argv[1])
    for name, make in MODULES.items():
        module = make()
        result = train(module, folder, strategy=DDPStrategy(process_group_backend="gloo"), devices=2)
        torch.save(result, folder / f"{name}-{module.global_rank}.pt")
    leave_group()


if __name__ == "__main__":
    main()
