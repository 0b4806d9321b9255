"""FID, Inception Score and their like in the course of training."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from einops import rearrange
from PIL.Image import Image
from torch import Tensor
from torchmetrics import Metric

from ldm.metrics import FrechetDistance, InceptionScore
from ldm.training.callbacks.cadence import Cadence, outside_training


class SampleMetrics(pl.Callback):
    """At validation, samples from the validation prompts and logs each metric as `val/NAME`, once for all of them.

    The prompts are captions of validation samples, evenly spread over all of them, and image number i has seed
    `seed + i`: the same pictures at every validation and on any number of ranks, which share the work. What the
    module samples with is its own matter (its moving average). `val/sampling_seconds` says what it cost.

    Args:
        distances: name -> `FrechetDistance`, generated against real images.
        scores: name -> `InceptionScore`, generated images alone; logs the mean over splits.
        num_images: sampled each time, over all ranks.
        every_n_steps: optimizer steps between two times; each waits for the next validation.
        batch_size: validation samples read at a time, on each rank.
        seed: of the first picture.
        reference: data module whose validation images are the real ones; None takes the run's own, which then have
            to be images, not moments.

    Raises:
        ValueError: no metric, or a count below 1.
    """

    def __init__(
        self,
        *,
        distances: Mapping[str, FrechetDistance] | None = None,
        scores: Mapping[str, InceptionScore] | None = None,
        num_images: int = 1000,
        every_n_steps: int = 1000,
        batch_size: int = 64,
        seed: int = 0,
        reference: pl.LightningDataModule | None = None,
    ) -> None:
        self.distances = dict(distances or {})
        self.scores = dict(scores or {})
        if not self.distances and not self.scores:
            raise ValueError(
                "got no metric for sampled images, expected some in distances or scores; choose callback=fid"
            )
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"got num_images={num_images} and batch_size={batch_size}, expected at least 1 of each")
        self.cadence = Cadence(every_n_steps)
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.reference = reference
        self._knows_reals = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raises ValueError where the module cannot sample or there are no prompts to take."""
        if not hasattr(pl_module, "sample"):
            raise ValueError(
                f"got metrics of samples with {type(pl_module).__name__}, expected a module that samples prompts; "
                "leave out callback=fid and callback=inception_score"
            )
        if not hasattr(trainer.datamodule, "iterate_once"):  # type: ignore[attr-defined]
            raise ValueError("got metrics of samples without a data module, expected one with validation captions")
        if self.reference is not None:
            # The data module shares its samples out by the trainer's ranks.
            self.reference.trainer = trainer

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts from here."""
        self.cadence.start(trainer.global_step)

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Samples, measures and logs where it is due."""
        if trainer.sanity_checking or not self.cadence.due(trainer.global_step):
            return
        start = time.perf_counter()
        with outside_training(trainer):
            values = self.measure(trainer.datamodule, pl_module)  # type: ignore[attr-defined]
        values["sampling_seconds"] = time.perf_counter() - start
        for name, value in values.items():
            pl_module.log(f"val/{name}", value, sync_dist=True)

    def measure(self, data: Any, pl_module: Any) -> dict[str, float]:
        """Each metric's value, the same on every rank."""
        metrics: list[Metric] = [*self.distances.values(), *self.scores.values()]
        for metric in metrics:
            metric.to(pl_module.device)
        self._see_reals(data, pl_module.device)
        for distance in self.distances.values():
            distance.reset_generated()
        for score in self.scores.values():
            score.reset()
        for numbers, prompts in self._prompts(data):
            pictures = pl_module.sample(prompts, seeds=[self.seed + number for number in numbers])
            self._see_generated(from_pil(pictures).to(pl_module.device), torch.tensor(numbers))
        distances = {name: distance.compute().item() for name, distance in self.distances.items()}
        return distances | {name: score.compute()[0].item() for name, score in self.scores.items()}

    def _see_reals(self, data: Any, device: torch.device) -> None:
        if self._knows_reals or not self.distances:
            return
        source: Any = self.reference or data
        for batch in source.iterate_once("validation", self.batch_size):
            if "image" not in batch:
                raise ValueError(
                    "got validation samples without images as the real ones of a Fréchet distance, expected images; "
                    "set callback.sample_metrics.reference to a data module that has them"
                )
            for distance in self.distances.values():
                distance.update(batch["image"].to(device), real=True)
        self._knows_reals = True

    def _see_generated(self, images: Tensor, numbers: Tensor) -> None:
        for distance in self.distances.values():
            distance.update(images, real=False)
        for score in self.scores.values():
            score.update(images, index=numbers)

    def _prompts(self, data: Any) -> Iterator[tuple[list[int], list[str]]]:
        """Batches of (picture numbers, captions) for this rank's share of the validation samples."""
        num_samples = len(data.dataset("validation"))
        for batch in data.iterate_once("validation", self.batch_size):
            spread = [
                range(*(place * self.num_images // num_samples for place in (i, i + 1)))
                for i in batch["index"].tolist()
            ]
            numbers = [int(number) for pictures in spread for number in pictures]
            captions = [caption for caption, pictures in zip(batch["caption"], spread, strict=True) for _ in pictures]
            if numbers:
                yield numbers, captions


def from_pil(pictures: list[Image]) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] from RGB pictures of one size."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return rearrange(pixels, "b h w c -> b c h w").float() / 127.5 - 1
