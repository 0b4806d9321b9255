"""Training on shards killed with SIGKILL at random times and taken up again, in a process that forks for each.

    python kill_trials.py FOLDER [TRIALS]

prints as JSON, for every trial, how far it had come, where it went on, and whether it read and computed the same.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.data import Record, ShardDataModule, write_shards
from ldm.data.ledger import FILE
from ldm.training.checkpoint_folders import newest_valid
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.checkpoints import Checkpoints

NUM_STEPS = 40
WORKERS = (0, 1, 2)


class KeepsBook(pl.LightningModule):
    """Learns a little from every sample, and writes down the keys of every step before it is taken."""

    def __init__(self, book: Path) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3 * 64, 1)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.book = book

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        dataset = self.trainer.datamodule.dataset("train")
        keys = [dataset.located(int(index))[1] for index in batch["index"]]
        line = {"step": self.global_step, "position": batch["position"].tolist(), "keys": keys}
        with self.book.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
        time.sleep(0.004)
        target = batch["position"].float() % 7
        return (self.layer(batch["image"].flatten(1)).squeeze(1) - target).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def write_data(folder: Path) -> Path:
    """Shards of 50 samples, three of which cannot be decoded."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    write_shards(folder, (Record(image, f"noise {i}") for i, image in enumerate(pixels)), samples_per_shard=9)
    for shard in sorted(folder.glob("*.tar"))[1:4]:
        shard.write_bytes(shard.read_bytes().replace(b"IDAT", b"IXXT", 1))
    return folder


def train(shards: Path, folder: Path, *, num_workers: int) -> None:
    """Trains from the newest checkpoint on, if there is one, to the end, and writes the weights' hash."""
    warnings.simplefilter("ignore")
    data = ShardDataModule(
        shards, batch_size=4, resolution=8, flip=True, seed=5, block_size=2, num_workers=num_workers,
        max_bad_fraction=0.1, run_folder=folder,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=NUM_STEPS,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        plugins=[AtomicCheckpointIO()],
        callbacks=[Checkpoints(folder / "checkpoints", every_n_steps=4)],
    )
    model = KeepsBook(folder / "book.jsonl")
    saved = newest_valid(folder / "checkpoints")
    with (folder / "starts.txt").open("a") as file:
        file.write(f"{saved}\n")
    trainer.fit(model, datamodule=data, ckpt_path=saved, weights_only=True if saved else None)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    (folder / "weights.txt").write_text(hashlib.sha256(weights.numpy().tobytes()).hexdigest())


def in_child(action: Callable[[], None], *, kill_after: float | None = None) -> int:
    """Runs an action in a forked process, killed after some seconds if asked; the exit status, -9 for killed."""
    child = os.fork()
    if child == 0:
        os.setpgrp()
        try:
            action()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # the workers would notice within seconds, and write nothing
    return status


def book(folder: Path) -> list[dict[str, Any]]:
    path = folder / "book.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trial(shards: Path, folder: Path, expected: Path, *, kill_after: float, workers: tuple[int, int]) -> dict[str, Any]:
    """Kills a training, takes it up again with another number of workers, and compares it with the whole one."""
    folder.mkdir()
    status = in_child(lambda: train(shards, folder, num_workers=workers[0]), kill_after=kill_after)
    came_to = len(book(folder))
    finished = in_child(lambda: train(shards, folder, num_workers=workers[1]))
    right = {line["step"]: line for line in book(expected)}
    lines = book(folder)
    return {
        "killed": status == -signal.SIGKILL,
        "finished": finished == 0,
        "came_to": came_to,
        "went_on_at": lines[came_to]["step"] if len(lines) > came_to else None,
        "same_keys": all(line == right[line["step"]] for line in lines),
        "all_steps": sorted({line["step"] for line in lines}) == list(range(NUM_STEPS)),
        "same_weights": (folder / "weights.txt").read_text() == (expected / "weights.txt").read_text(),
        "same_ledger": sorted((folder / FILE).read_text().splitlines())
        == sorted((expected / FILE).read_text().splitlines()),
        "workers": workers,
    }


def main() -> None:
    folder, trials = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20
    torch.set_num_threads(1)
    shards, expected, times = write_data(folder / "shards"), folder / "expected", random.Random(0)
    expected.mkdir()
    started = time.monotonic()
    assert in_child(lambda: train(shards, expected, num_workers=0)) == 0
    longest = time.monotonic() - started
    found = []
    for number in range(trials):
        workers = (WORKERS[number % 3], WORKERS[number // 3 % 3])
        kill_after = times.uniform(0.1, 0.95) * longest
        found.append(trial(shards, folder / str(number), expected, kill_after=kill_after, workers=workers))
    print(json.dumps({"seconds_whole": longest, "trials": found}))


if __name__ == "__main__":
    main()
