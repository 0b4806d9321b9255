"""A tiny model and tiny data, trained by one process and by two: what `ldm doctor` looks at.

`python -m ldm.training.trial FOLDER` is one of the two processes; the caller starts both and goes on where they wait.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.autoencoders import KLAutoencoder
from ldm.conditioners import ClassLabel
from ldm.data import Record, ShardDataModule, write_shards
from ldm.diffusion import Denoiser, Guidance, parameterizations, schedules, times, weightings
from ldm.generation import SamplingSettings
from ldm.networks import UNet
from ldm.samplers import Euler, Trailing
from ldm.training.callbacks.self_check import SelfCheck
from ldm.training.callbacks.unfinished_step import UnfinishedStep
from ldm.training.checkpoint_folders import newest_valid
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.checkpoints import Checkpoints
from ldm.training.honesty import gradients
from ldm.training.latent_diffusion import LatentDiffusionModule
from ldm.training.latent_scale import measure_latent_scale
from ldm.training.optim import constant
from ldm.training.ranks import free_port

NUM_SAMPLES, BATCH_SIZE, STEPS, PHASE = 24, 6, 12, 4
NUM_PROCESSES = 2
_GEOMETRY: dict[str, Any] = {
    **{"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2]},
    **{"num_heads": 2, "context_dim": 8, "norm_groups": 4},
}
# Seconds until processes that wait for each other give up.
PATIENCE = 120


def write_data(folder: Path) -> None:
    """Shards of noisy 16 x 16 pictures of three classes."""
    random = np.random.default_rng(0)
    rows = [
        Record(random.integers(0, 256, (16, 16, 3)).astype(np.uint8), f"picture {i}", {"label": i % 3})
        for i in range(NUM_SAMPLES)
    ]
    write_shards(folder, iter(rows), samples_per_shard=10)


def make_module(*, ema_decay: float = 0.9) -> LatentDiffusionModule:
    """Latent diffusion of a few thousand parameters, the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder = KLAutoencoder(base_channels=8, channel_mult=[1, 2], num_res_blocks=1, norm_groups=4)
        network = UNet(4, 4, **_GEOMETRY)
        for parameter in (*network.parameters(), *autoencoder.parameters()):
            # Layers that start as zero would leave gradients with nothing to differ in.
            parameter.data += 0.05 * torch.randn_like(parameter)
        denoiser = Denoiser(
            network,
            schedule=schedules.RectifiedFlow(),
            parameterization=parameterizations.Velocity(),
            weighting=weightings.Unit(),
            times=times.LogitNormal(),
        )
        return LatentDiffusionModule(
            denoiser,
            conditioner=ClassLabel(3, width=8, column="label"),
            autoencoder=autoencoder,
            # Not Adam: it turns rounding errors of gradients that are zero into whole steps.
            optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
            lr_schedule=constant,
            sampling=SamplingSettings(Euler(), Trailing(), Guidance(scale=1.0), num_steps=2, image_size=16),
            ema_decay=ema_decay,
        )


class Watch(pl.Callback):
    """Keeps which samples were read and the first gradients, and follows the average by its formula, step by step."""

    def __init__(self) -> None:
        self.places: list[tuple[int, int]] = []
        self.average: list[Tensor] = []
        self.gradients: dict[str, Tensor] = {}
        self._steps = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begins with the average as it is."""
        self.average = [p.detach().clone() for p in pl_module.ema.module.parameters()]
        self._steps = trainer.global_step

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Keeps what the very first step is made of; later ones begin from weights that differ in their last bits."""
        if not self.gradients:
            self.gradients = {name: value.clone() for name, value in gradients(pl_module).items()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Notes the samples; after an optimizer step, and only then, moves the expected average."""
        epochs = batch["position"] // NUM_SAMPLES
        self.places += list(zip(epochs.tolist(), batch["index"].tolist(), strict=True))
        if trainer.global_step > self._steps:
            weight = 1 - min(pl_module.ema.decay, (1 + self._steps) / (10 + self._steps))
            self.average = [
                a.lerp(p.detach(), weight) for a, p in zip(self.average, pl_module.trained.parameters(), strict=True)
            ]
            self._steps = trainer.global_step


def train(
    folder: Path, *, max_steps: int, processes: int, accumulate: int = 1, name: str | None = None
) -> dict[str, Any]:
    """Trains to a step, on from the newest checkpoint of `name` if that is given; what there is to compare.

    Raises:
        RanksDisagree: `SelfCheck` found something.
    """
    module, watch = make_module(), Watch()
    data = ShardDataModule(
        folder / "data", batch_size=BATCH_SIZE // accumulate, resolution=16, seed=3, columns=["label"]
    )
    callbacks: list[pl.Callback] = [watch, SelfCheck()]
    if name:
        callbacks += [Checkpoints(folder / name, every_n_steps=PHASE), UnfinishedStep([])]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_checkpointing=bool(name),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    place = newest_valid(folder / name) if name else None
    trainer.fit(module, data, ckpt_path=place, weights_only=True if place else None)
    pairs = zip(watch.average, module.ema.module.parameters(), strict=True)
    shift, scale = measure_latent_scale(module.autoencoder, data)
    return {
        "weights": {key: value.detach().clone() for key, value in module.state_dict().items()},
        "gradients": watch.gradients,
        "places": watch.places,
        "average": max((a - b).abs().max().item() for a, b in pairs),
        "scale": [shift, scale],
    }


def rank_main(folder: Path) -> None:
    """What one of the processes does: trains straight through and in parts, the second part being another's."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    straight = train(folder, max_steps=STEPS, processes=NUM_PROCESSES)
    train(folder, max_steps=PHASE, processes=NUM_PROCESSES, name="parts")
    (folder / f"waiting-{rank}").touch()
    wait_for([folder / "goes_on"])
    parts = train(folder, max_steps=STEPS, processes=NUM_PROCESSES, name="parts")
    torch.save({"straight": straight, "parts": parts}, folder / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def run(folder: Path, *, words: tuple[str, ...] = ("-m", "ldm.training.trial")) -> dict[str, Any]:
    """Trains with two processes, with this one, and with both in turn; returns what came of each.

    Args:
        folder: an empty one.
        words: what Python runs in the two processes, with the folder behind it.

    Raises:
        RuntimeError: one of them failed; with the last it said.
    """
    write_data(folder / "data")
    ranks = [_start(folder, rank, words, port) for port in [free_port()] for rank in range(NUM_PROCESSES)]
    try:
        alone = train(folder, max_steps=STEPS, processes=1)
        accumulated = train(folder, max_steps=STEPS, processes=1, accumulate=2)
        wait_for([folder / f"waiting-{rank}" for rank in range(NUM_PROCESSES)], ranks)
        train(folder, max_steps=2 * PHASE, processes=1, name="parts")
        (folder / "goes_on").touch()
        for process in ranks:
            if process.wait(PATIENCE):
                raise RuntimeError(_said(folder))
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    found = [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(NUM_PROCESSES)]
    return {"alone": alone, "accumulated": accumulated, "ranks": found}


def wait_for(paths: list[Path], processes: list[subprocess.Popen[bytes]] | None = None) -> None:
    """Waits until all of these are there.

    Raises:
        RuntimeError: a process that should make one has failed, or it takes too long.
    """
    deadline = time.monotonic() + PATIENCE
    while not all(path.exists() for path in paths):
        if any(process.poll() for process in processes or []):
            raise RuntimeError(_said(paths[0].parent))
        if time.monotonic() > deadline:
            raise RuntimeError(f"{PATIENCE} seconds went by without a word from the other processes")
        time.sleep(0.05)


def _start(folder: Path, rank: int, words: tuple[str, ...], port: int) -> subprocess.Popen[bytes]:
    own = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(NUM_PROCESSES)}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    hidden = ("RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    with (folder / f"said-{rank}.txt").open("wb") as said:
        command = [sys.executable, *words, os.fspath(folder)]
        return subprocess.Popen(command, env={**kept, **own, **place}, stdout=said, stderr=said)


def _said(folder: Path) -> str:
    """The last line of what the processes said before they ended."""
    lines = [
        line for path in sorted(folder.glob("said-*.txt")) for line in path.read_text().splitlines() if line.strip()
    ]
    errors = [line for line in lines if "Error" in line or "RanksDisagree" in line]
    return (errors or lines or ["a process ended without a word"])[-1].strip()


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
