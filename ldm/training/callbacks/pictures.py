"""Where pictures of a run go: a file in its folder, and every logger that shows pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from PIL.Image import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

from ldm.training.loggers import outliving


def keep_picture(picture: Image, path: Path, *, trainer: pl.Trainer, name: str) -> None:
    """Saves a picture and hands it to TensorBoard and W&B loggers under `name`; on rank zero only."""
    if not trainer.is_global_zero:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            with outliving(logger):
                logger.experiment.add_image(name, np.asarray(picture), trainer.global_step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [picture], step=trainer.global_step)
