"""Trains in two processes that hold a part of every parameter each; Lightning starts this file once more.

Usage: fsdp2_worker.py FOLDER, which holds the shards `colours` and takes what rank 0 ends with.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ddp_worker import MODULES
from tiny_models import quiet_trainer

from ldm.data import ShardDataModule
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
    leave_group()


if __name__ == "__main__":
    main()
