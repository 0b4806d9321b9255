"""Pictures of the model as it learns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL.Image import Image

from ldm.generation.postprocess import grid
from ldm.training.callbacks.cadence import Cadence, outside_training
from ldm.training.callbacks.pictures import keep_picture

MAX_TRAJECTORY_COLUMNS = 10


class SampleGrid(pl.Callback):
    """Every so many steps, and at the end, samples the same prompts with the same seeds.

    Writes `folder/step=000200.png`, and `folder/trajectory_step=000200.png`: how the first prompt's picture came to be,
    noisy states in the upper row, what the model believed them to become in the lower one. Every rank samples, so
    that sharded weights can be gathered; rank zero writes.

    Args:
        folder: where the pictures go.
        every_n_steps: optimizer steps between two grids.
        prompts: what to sample; None takes the captions of the first validation samples.
        num_images: how many captions are taken then.
        seed: of the first picture; the others count up from it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every_n_steps: int = 500,
        prompts: Sequence[str] | None = None,
        num_images: int = 16,
        seed: int = 0,
    ) -> None:
        self.folder = Path(folder)
        self.cadence = Cadence(every_n_steps)
        self.prompts = list(prompts) if prompts is not None else None
        self.num_images = num_images
        self.seed = seed

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Raises ValueError where the module cannot sample, or where there is nothing to take prompts from.

        An encoder that only prompts need is loaded here: what is wrong with it is to show before training, not after,
        and so is a model that needs pictures besides.
        """
        if not hasattr(pl_module, "sample"):
            raise ValueError(
                f"got callback sample_grid with {type(pl_module).__name__}, expected a module that samples prompts; "
                "leave it out (~callback.sample_grid)"
            )
        if self.prompts is None and not hasattr(trainer.datamodule, "iterate_once"):  # type: ignore[attr-defined]
            raise ValueError(
                "got no callback.sample_grid.prompts and no data module to take captions from; set prompts"
            )
        if hasattr(pl_module, "pipeline"):
            pipeline = pl_module.pipeline()
            try:
                pipeline.require_plain()
                pipeline.conditioner.num_chunks("")
            except (ValueError, OSError) as error:
                raise ValueError(f"{error}; or leave out the pictures (~callback.sample_grid)") from error

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settles the prompts."""
        self.cadence.start(trainer.global_step)
        if self.prompts is None:
            self.prompts = first_captions(trainer.datamodule, self.num_images)  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Samples where it is due."""
        if self.cadence.due(trainer.global_step):
            self.sample(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Samples the end, unless that was just done."""
        if self.cadence.last_step != trainer.global_step:
            self.cadence.start(trainer.global_step)
            self.sample(trainer, pl_module)

    @torch.no_grad()
    def sample(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Writes the grid and the trajectory of this step."""
        assert self.prompts is not None
        with outside_training(trainer):
            step = f"step={trainer.global_step:06d}.png"
            pictures = pl_module.sample(self.prompts, seeds=range(self.seed, self.seed + len(self.prompts)))
            keep_picture(grid(pictures), self.folder / step, trainer=trainer, name="samples")
            strip = trajectory_strip(pl_module.sample_trajectory(self.prompts[0], seed=self.seed))
            keep_picture(strip, self.folder / f"trajectory_{step}", trainer=trainer, name="trajectory")


def trajectory_strip(states: Sequence[tuple[Image, Image]]) -> Image:
    """Two rows, (noisy state, believed picture) a column; long trajectories are thinned out evenly."""
    last = len(states) - 1
    num_columns = min(len(states), MAX_TRAJECTORY_COLUMNS)
    chosen = [states[round(i * last / max(1, num_columns - 1))] for i in range(num_columns)]
    noisy, believed = zip(*chosen, strict=True)
    return grid([*noisy, *believed], num_columns=num_columns)


def first_captions(data: Any, count: int) -> list[str]:
    """Captions of the first validation samples.

    Raises:
        ValueError: the samples have none.
    """
    batch: dict[str, Any] = next(islice(data.iterate_once("validation", count), 1), {})
    if "caption" not in batch:
        raise ValueError(
            "got validation samples without captions, expected some to sample; set callback.sample_grid.prompts"
        )
    return list(batch["caption"])
