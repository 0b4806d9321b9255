"""Pictures of what an autoencoder keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.generation.postprocess import grid, to_pil
from ldm.training.callbacks.cadence import Cadence, outside_training
from ldm.training.callbacks.pictures import keep_picture


class ReconstructionGrid(pl.Callback):
    """At validation, writes `folder/reconstruction_step=000200.png`: originals above their reconstructions.

    Always the first images of the first validation batch.

    Args:
        folder: where the pictures go.
        every_n_steps: optimizer steps between two of them; each waits for the next validation.
        num_images: how many images.
    """

    def __init__(self, folder: str | Path, *, every_n_steps: int = 1, num_images: int = 16) -> None:
        self.folder = Path(folder)
        self.cadence = Cadence(every_n_steps)
        self.num_images = num_images

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raises ValueError where the module cannot reconstruct."""
        if not hasattr(pl_module, "reconstruct"):
            raise ValueError(
                f"got callback reconstruction_grid with {type(pl_module).__name__}, expected a module that "
                "reconstructs images; leave it out (~callback.reconstruction_grid)"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts from here."""
        self.cadence.start(trainer.global_step)

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the grid from the first batch."""
        if batch_idx or trainer.sanity_checking or not self.cadence.due(trainer.global_step):
            return
        with outside_training(trainer):
            images = batch["image"][: self.num_images]
            pictures = [*to_pil(images), *to_pil(pl_module.reconstruct(images))]
            path = self.folder / f"reconstruction_step={trainer.global_step:06d}.png"
            keep_picture(grid(pictures, num_columns=len(images)), path, trainer=trainer, name="reconstructions")
