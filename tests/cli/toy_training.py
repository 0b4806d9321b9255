"""A model and data of a few numbers: what the command line needs of a real experiment, trained in a second."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class ToyData(pl.LightningDataModule):
    """Batches of two rows of noise."""

    def __init__(self, *, size: int = 4, folder: str | None = None) -> None:
        super().__init__()
        self.size = size
        self.folder = folder

    def setup(self, stage: str) -> None:
        if self.folder is not None and not Path(self.folder).is_dir():
            raise FileNotFoundError(f"no data in {self.folder}; write it first")

    def train_dataloader(self) -> DataLoader:
        rows = torch.randn(2000, self.size, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(rows), batch_size=2)


class ToyModel(pl.LightningModule):
    """Shrinks a linear layer.

    Args:
        width: outputs.
        learning_rate: of SGD.
        fail_at: a step at which training raises, or None.
        kill_at: a step at which the process sends itself `signal_number`, or None.
        kill_again_after: seconds until it does so once more, or None.
        nan_from: the step from which the loss is not a number, or None.
        seconds_per_step: waiting time.
    """

    def __init__(
        self,
        *,
        width: int = 4,
        learning_rate: float = 0.1,
        fail_at: int | None = None,
        kill_at: int | None = None,
        signal_number: int = signal.SIGINT,
        kill_again_after: float | None = None,
        nan_from: int | None = None,
        seconds_per_step: float = 0.0,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width: got {width}, expected at least 1")
        self.layer = torch.nn.Linear(4, width)
        self.learning_rate, self.fail_at, self.kill_at = learning_rate, fail_at, kill_at
        self.signal_number, self.seconds_per_step = signal_number, seconds_per_step
        self.kill_again_after, self.nan_from = kill_again_after, nan_from

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == self.fail_at:
            raise ValueError("training itself went wrong")
        if self.global_step == self.kill_at:
            os.kill(os.getpid(), self.signal_number)
            if self.kill_again_after is not None:
                time.sleep(self.kill_again_after)
                os.kill(os.getpid(), self.signal_number)
        time.sleep(self.seconds_per_step)
        loss = self.layer(batch[0]).square().mean()
        if self.nan_from is not None and self.global_step >= self.nan_from:
            loss = loss * float("nan")
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)

    def finish(self, folder: Path, *, data: ToyData, config: dict) -> dict:
        (folder / "sum.json").write_text(json.dumps(self.layer.weight.sum().item()))
        return {"sum": self.layer.weight.sum(), "size": data.size, "learning_rate": config["model"]["learning_rate"]}


def write_rows(folder: Path, *, count: int) -> dict:
    """A dataset writer for `ldm shard`."""
    (folder / "rows.json").write_text(json.dumps(list(range(count))))
    return {"rows": count}


class CountPictures:
    """An evaluation: samples some pictures and counts them."""

    def __init__(self, *, num_pictures: int) -> None:
        self.num_pictures = num_pictures

    def __call__(self, pipeline: Any, folder: Path, **settings: Any) -> dict[str, Any]:
        pictures = pipeline.sample(["a red seven"] * self.num_pictures, seeds=range(self.num_pictures), **settings)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps({"pictures": len(pictures)}))
        return {"pictures": len(pictures), "settings": sorted(settings)}


class Pixels(torch.nn.Module):
    """A feature network: the means of twelve patches of an image."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1)
