"""The first steps of a run of several processes are looked at closely; all others cost nothing."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer

from ldm.training import honesty
from ldm.training.honesty import RanksDisagree, differing, gathered, listed, repeated
from ldm.training.sharding import spreads_parameters


class SelfCheck(pl.Callback):
    """Compares all ranks of a run before its first forward pass and after its first few steps, bit for bit.

    Checked are parameters, buffers (the latent scale is one) and moving averages, before a forward pass of DDP hands
    out one rank's buffers and so hides what differed; gradients, once they should be synchronised; and that no place in
    the stream of samples is read twice. All ranks learn of a failure at once and end together. Parameters that a
    strategy spreads over the ranks differ by intention, and are left out with their gradients.

    Args:
        num_steps: optimizer steps that are looked at, from the one that a run begins or goes on at.

    Raises:
        ValueError: fewer than one step.
    """

    def __init__(self, *, num_steps: int = 3) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps: got {num_steps}, expected at least 1; leave the callback out instead")
        self.num_steps = num_steps
        self._last_step: int | None = None
        self._is_first = True
        self._seen: list[int] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts from the step that training begins or goes on at."""
        self._seen, self._is_first = [], True
        self._last_step = trainer.global_step + self.num_steps if trainer.world_size > 1 else None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Compares what training begins with, and looks at which places in the stream all ranks have got.

        Raises:
            RanksDisagree: it is not the same everywhere, or some places came twice.
        """
        if self._is_first:
            self._compare(trainer, pl_module, "before the first step")
            self._is_first = False
        if self._last_step is None or not isinstance(batch, dict) or "position" not in batch:
            return
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            return
        self._seen += gathered(batch["position"]).flatten().tolist()
        if again := repeated(self._seen):
            raise RanksDisagree(
                f"samples were read twice, those at the places {listed(again)} of the stream; the ranks' loaders do "
                "not share the data out (is trainer.use_distributed_sampler on?)"
            )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Compares the gradients that the step is made of.

        Raises:
            RanksDisagree: they were not synchronised.
        """
        if self._last_step is None or spreads_parameters(trainer.strategy):
            return
        if wrong := differing(honesty.gradients(pl_module)):
            raise RanksDisagree(
                f"gradients differ between the ranks at step {trainer.global_step}: {listed(wrong)}; they were not "
                "synchronised (a loss outside of training_step, or no_sync?)"
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compares what the last of the steps has made, and is done.

        Raises:
            RanksDisagree: it is not the same everywhere.
        """
        if self._last_step is not None and trainer.global_step >= self._last_step:
            self._compare(trainer, pl_module, f"after step {trainer.global_step}")
            self._last_step = None

    def _compare(self, trainer: pl.Trainer, pl_module: pl.LightningModule, when: str) -> None:
        if self._last_step is None or spreads_parameters(trainer.strategy):
            return
        if wrong := differing(honesty.state(pl_module)):
            raise RanksDisagree(
                f"weights differ between the ranks {when}: {listed(wrong)}; training them on would give as many "
                "models as there are ranks (drawn without a common seed, or changed on one rank alone?)"
            )
