"""Training images beside an evaluation's samples: what a model has learned by heart shows among them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.files import write_text
from ldm.generation.evaluation.evaluate import Evaluation
from ldm.generation.evaluation.images import Images
from ldm.generation.evaluation.workers import Workers

# Beside evaluation.json: where the training images are, and their features.
TRAINING = "training.json"
MOST = 50_000


class Every:
    """Every n-th image of a set, so that at most `most` are left."""

    def __init__(self, images: Images, *, most: int = MOST) -> None:
        self.images, self.every = images, -(-len(images) // most)

    def __len__(self) -> int:
        return -(-len(self.images) // self.every)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """As in `Images`."""
        return self.images[index * self.every]

    def name(self, index: int) -> str:
        """As in `Images`."""
        return self.images.name(index * self.every)

    def describe(self) -> dict[str, Any]:
        """As in `Images`; of a whole set what it says itself, so that its features serve both."""
        return self.images.describe() if self.every == 1 else {**self.images.describe(), "every": self.every}


def keep_beside(
    evaluation: Evaluation, training: Images, folder: Path, *, device: torch.device, workers: Workers
) -> None:
    """Writes folder/training.json: where training images are, and their features by the first network of the metrics.

    Features are kept where those of the reference are, for all evaluations. Where no metric has a network there are
    none, and reports compare pixels.

    Args:
        training: of which at most 50,000 are looked at, evenly spread.
        folder: of the finished evaluation.
    """
    training = evaluation.usable(training)
    images = Every(training)
    store = evaluation.store_of(images, folder)
    told = {**training.describe(), "every": images.every}
    if network := next(iter(evaluation.networks.items()), None):
        workers.do(store.tasks(dict([network]), device), store.folder)
        told |= {"network": network[0], "features_folder": str(store.folder.absolute())}
    write_text(folder / TRAINING, json.dumps(told, indent=1) + "\n")
