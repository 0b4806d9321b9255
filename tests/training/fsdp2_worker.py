"""Trains in two processes that hold a part of every parameter each; Lightning starts this file once more.

Usage: fsdp2_worker.py FOLDER, which holds the shards `colours` and takes what rank 0 ends with.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ddp_worker import MODULES
from tiny_models import latent_diffusion_module, quiet_trainer

from ldm.conditioners import Unconditional
from ldm.data import ShardDataModule
from ldm.diffusion import Denoiser, parameterizations, schedules, times, weightings
from ldm.networks import EDM2UNet
from ldm.training import LatentDiffusionModule
from ldm.training.callbacks import GradientNorm, SpikeGuard
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.checkpoints import Checkpoints
from ldm.training.fit import leave_group
from ldm.training.sharding import whole_state
from ldm.training.strategies import fsdp2


def train(folder: Path, kind: str, *, checkpoint: Path | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """All weights, gathered, after four steps on global batches of six, and what they validate and sample."""
    module = MODULES["latent_diffusion"]()
    data = ShardDataModule(folder / "colours", folder / "colours", batch_size=6, resolution=16, seed=3)
    trainer = quiet_trainer(
        max_steps=4,
        strategy=fsdp2(state_dict_type=kind),
        devices=2,
        enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
        gradient_clip_val=0.5,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        callbacks=[
            Checkpoints(folder / kind, every_n_steps=2),
            SpikeGuard(folder / "skipped.jsonl"),
            GradientNorm(),
        ],
        **options,
    )
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    parameters = list(module.trained.denoiser.network.parameters())
    share = sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters)
    numbers = trainer.validate(module, data, verbose=False)[0]
    picture = module.sample(["red"], seeds=[0])[0]
    result = whole_state(module)
    summary = module.finish(folder, data=data, config={"autoencoder": {}})
    assert summary == {"weights": "weights.safetensors"}
    return {**result, "share": torch.tensor(share), "loss": torch.tensor(numbers["val/loss"]), "mean": mean(picture)}


def edm2_module() -> LatentDiffusionModule:
    """A model of scalar gains and a learned uncertainty, whose weights have magnitude 1 after every step."""
    torch.manual_seed(0)
    geometry = {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2]}
    network = EDM2UNet(4, 4, num_head_channels=8, uncertainty_channels=8, **geometry)
    for name, parameter in network.named_parameters():
        if name.endswith("gain"):
            # At 0, where training starts, few others have a gradient.
            torch.nn.init.ones_(parameter)
    denoiser = Denoiser(
        network,
        schedule=schedules.EDM(),
        parameterization=parameterizations.EDM(),
        weighting=weightings.EDM(),
        times=times.LogNormal(),
    )
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    return latent_diffusion_module(denoiser=denoiser, conditioner=Unconditional(), optimizer=optimizer)


def train_edm2(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """All its weights, gathered, after four steps on global batches of six."""
    module = edm2_module()
    data = ShardDataModule(folder / "colours", folder / "colours", batch_size=6, resolution=16, seed=3)
    quiet_trainer(max_steps=4, **options).fit(module, data)
    return whole_state(module)


def mean(picture: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(picture, dtype=np.float32)).mean()


def main() -> None:
    folder = Path(sys.argv[1])
    for kind in ("full", "sharded"):
        straight = train(folder, kind)
        middle = folder / kind / "step=000000002.ckpt"
        resumed = train(folder, kind, checkpoint=middle)
        if torch.distributed.get_rank() == 0:
            torch.save({"straight": straight, "resumed": resumed}, folder / f"{kind}.pt")
    edm2 = train_edm2(folder, strategy=fsdp2(), devices=2)
    if torch.distributed.get_rank() == 0:
        torch.save(edm2, folder / "edm2.pt")
    leave_group()


if __name__ == "__main__":
    main()
