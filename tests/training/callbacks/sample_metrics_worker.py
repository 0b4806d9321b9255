"""Trains the tiny module for two steps with metrics of its samples, on as many processes as are asked for."""

import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from conftest import Captions, Tiny
from torch import nn

from ldm.metrics import FrechetDistance, KernelDistance
from ldm.training.callbacks import SampleMetrics


class Means(nn.Module):
    """The mean of each channel."""

    num_features = 3

    def forward(self, images):
        return images.double().mean((2, 3))


def train(folder: Path, processes: int) -> None:
    metrics = {"fid": FrechetDistance(Means()), "kid": KernelDistance(Means(), num_subsets=3, subset_size=5)}
    callback = SampleMetrics(
        metrics=metrics, num_images=11, every_n_steps=2, batch_size=3, folder=folder / "evaluations", keep_images=True
    )
    module = Tiny()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_steps=4,
        max_epochs=-1,
        val_check_interval=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module, Captions())
    values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    seeds = [seed for _, batch in module.sampled for seed in batch]
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps({"values": values, "seeds": seeds}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), int(sys.argv[2]))
