"""A module, data and trainer small enough to fit in a test of a callback."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from ldm.training.loggers import MetricsCSV


class Captions(pl.LightningDataModule):
    """Random images with captions; `validation` of them to validate on."""

    def __init__(self, *, validation: int = 10, batch_size: int = 4) -> None:
        super().__init__()
        self.num_validation = validation
        self.batch_size = batch_size

    def dataset(self, split: str) -> range:
        return range(self.num_validation)

    def iterate_once(self, split: str, batch_size: int):
        for start in range(0, self.num_validation, batch_size):
            yield self._batch(range(start, min(start + batch_size, self.num_validation)))

    def train_dataloader(self):
        return DataLoader([self._batch(range(i, i + self.batch_size)) for i in range(1000)], batch_size=None)

    def val_dataloader(self):
        return DataLoader(list(self.iterate_once("validation", self.batch_size)), batch_size=None)

    def _batch(self, indices: range) -> dict:
        images = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in indices]
        captions = [f"picture {i}" for i in indices]
        return {"image": torch.stack(images), "caption": captions, "index": torch.tensor(list(indices))}


class Tiny(pl.LightningModule):
    """One convolution that learns to copy; samples flat pictures whose level is their seed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Conv2d(3, 3, 3, padding=1)
        self.sampled: list[tuple[list[str], list[int]]] = []

    def training_step(self, batch, batch_idx):
        loss = (self.network(batch["image"]) - batch["image"]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.network(batch["image"]).square().mean(), batch_size=len(batch["image"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def sample(self, prompts, *, seeds, **settings):
        self.sampled.append((list(prompts), list(seeds)))
        self.settings = settings
        return [Image.new("RGB", (8, 8), (seed % 256, 0, 0)) for seed in seeds]

    def sample_trajectory(self, prompt, *, seed):
        return [(Image.new("RGB", (8, 8), (step, 0, 0)), Image.new("RGB", (8, 8), (0, step, 0))) for step in range(25)]

    def reconstruct(self, images):
        return -images


@pytest.fixture
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture
def data() -> Captions:
    return Captions()


@pytest.fixture
def fit(tmp_path: Path):
    """Trains a module with callbacks on a CPU, metrics going to `tmp_path/metrics.csv`; returns the trainer."""

    def train(module, data, callbacks, *, max_steps=6, **settings) -> pl.Trainer:
        defaults = {"log_every_n_steps": 2, "limit_val_batches": 0, "logger": MetricsCSV(tmp_path)}
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=max_steps,
            max_epochs=-1,
            callbacks=callbacks,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=tmp_path,
            **({"enable_progress_bar": False, "enable_checkpointing": False} | defaults | settings),
        )
        trainer.fit(module, data)
        return trainer

    return train


@pytest.fixture
def logged(tmp_path: Path):
    """Steps and values of a metric in `metrics.csv`."""
    import csv

    def read(name: str) -> dict[int, float]:
        with (tmp_path / "metrics.csv").open(newline="") as file:
            return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}

    return read
