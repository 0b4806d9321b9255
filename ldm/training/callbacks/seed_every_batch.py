"""Random numbers of code that knows nothing of samples, dropout's for one, survive a resume."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch


class SeedEveryBatch(pl.Callback):
    """Seeds Python, NumPy and torch, its devices included, before each batch, by (seed, batch, rank).

    So no checkpoint has to keep the state of any generator of any rank, and what is drawn in validations or while
    pictures are made moves nothing in training. What belongs to samples (`ldm.training.randomness`) needs none of it.

    Args:
        seed: the run's.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seeds by the number of the batch in the whole run."""
        seed_all(self.seed, trainer.fit_loop.epoch_loop.total_batch_idx, trainer.global_rank)


def seed_all(*numbers: int) -> None:
    """Seeds every global generator by a hash of the numbers; waits for no device."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed: where CUDA is there and unused, that formats the whole stack each time, in 0.1 ms.
    torch.default_generator.manual_seed(seed >> 1)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed >> 1)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed >> 1)
