"""Keeps averages with power-function profiles while a model trains, for averages of any length after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from ldm.training.callbacks.cadence import Cadence, outside_training
from ldm.training.post_hoc_ema import (
    DTYPES,
    PowerEMA,
    Profile,
    gamma_of,
    thinned,
    write_snapshot,
    written_snapshots,
)


class PostHocEMA(pl.Callback):
    """Tracks averages of a module's `trained` and writes snapshots, for `ldm.training.post_hoc_ema.reconstruct`.

    Every optimizer step counts, also one that changed nothing. Checkpoints hold the averages, so that a run goes on
    with the same bits; snapshots of steps that it has yet to take again are removed then.

    Args:
        folder: where snapshots go.
        sigma_rels: relative widths of the averages; two are enough for all lengths near and between them.
        every_n_steps: optimizer steps between snapshots; the end of training has one too.
        dtype: of the snapshots: float32, float16 or bfloat16; averages themselves are float32 at least.
        keep: how many steps with snapshots stay at most, evenly spaced: see `thinned`; None is all.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        sigma_rels: Sequence[float] = (0.05, 0.1),
        every_n_steps: int = 500,
        dtype: str = "float16",
        keep: int | None = None,
    ) -> None:
        if not sigma_rels or len(set(sigma_rels)) < len(sigma_rels):
            raise ValueError(f"sigma_rels: got {list(sigma_rels)}, expected different numbers, such as [0.05, 0.1]")
        for sigma_rel in sigma_rels:
            gamma_of(sigma_rel)
        if dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype}, expected one of {', '.join(DTYPES)}")
        if keep is not None and keep < 2:
            raise ValueError(f"keep: got {keep}, expected at least 2, or null for all")
        self.folder, self.sigma_rels = Path(folder), tuple(float(sigma_rel) for sigma_rel in sigma_rels)
        self.dtype, self.keep = dtype, keep
        self.averages: list[PowerEMA[nn.Module]] = []
        self._cadence = Cadence(every_n_steps)
        self._step = 0
        self._written: int | None = None
        self._names: list[str] = []
        self._is_restored = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes the averages, which a checkpoint fills afterwards.

        Raises:
            ValueError: the module has nothing to average, or its parameters are spread over devices.
        """
        if stage != "fit":
            return
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise ValueError(
                f"got post_hoc_ema with {type(trainer.strategy).__name__}, which spreads parameters over devices; "
                "choose strategy=ddp, or leave callback.post_hoc_ema out"
            )
        trained = _trained(pl_module)
        self._names = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
        self.averages = [PowerEMA(trained, sigma_rel=sigma_rel) for sigma_rel in self.sigma_rels]
        self._is_restored = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins or goes on; what snapshots say of steps to come is given up."""
        self._step, self._written = trainer.global_step, None
        self._cadence.start(trainer.global_step)
        for average in self.averages:
            average.to(pl_module.device)
        if trainer.global_step and not self._is_restored:
            self._begin_late(trainer.global_step, _trained(pl_module))
        if trainer.is_global_zero:
            for step, path in written_snapshots(self.folder):
                if step > trainer.global_step:
                    path.unlink()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follows an optimizer step, and writes snapshots where they are due."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        for average in self.averages:
            average.update(_trained(pl_module), num_updates=self._step - 1)
        if self._cadence.due(self._step):
            self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes snapshots of the end."""
        if self._step and self._written != self._step:
            self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The averages' own parameters."""
        return {
            "averages": [
                {"sigma_rel": average.sigma_rel, "parameters": self._parameters(average)} for average in self.averages
            ]
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the averages over.

        Raises:
            ValueError: they are of other lengths, or of another model.
        """
        found = {saved["sigma_rel"]: saved["parameters"] for saved in state_dict["averages"]}
        if set(found) != set(self.sigma_rels):
            raise ValueError(
                f"sigma_rels: got {list(self.sigma_rels)}, expected {list(found)} as in the checkpoint: what was not "
                "tracked from the start cannot be tracked now"
            )
        for average in self.averages:
            own, saved = self._parameters(average), found[average.sigma_rel]
            if {name: value.shape for name, value in own.items()} != {
                name: value.shape for name, value in saved.items()
            }:
                raise ValueError("got a checkpoint whose averages are of another model, expected those of this one")
            for name, value in own.items():
                value.copy_(saved[name])
        self._is_restored = True

    def _parameters(self, average: PowerEMA[nn.Module]) -> dict[str, Tensor]:
        """Those of an average that are not shared with what is trained."""
        every = dict(average.module.named_parameters())
        return {name: every[name].data for name in self._names}

    def _begin_late(self, step: int, trained: nn.Module) -> None:
        """Takes the parameters of now for those of all steps before."""
        rank_zero_warn(
            f"got a checkpoint of step {step} without averages of post_hoc_ema: they begin now, as if the parameters "
            f"had been the same in all {step} steps before"
        )
        now = dict(trained.named_parameters())
        for average in self.averages:
            for name, value in self._parameters(average).items():
                value.copy_(now[name].data)

    def _write(self, trainer: pl.Trainer) -> None:
        """Writes snapshots of this step and removes those too many, on rank zero, for which the others wait."""
        self._written = self._step
        with outside_training(trainer):
            if trainer.is_global_zero:
                self._write_snapshots()
                self._thin()
            trainer.strategy.barrier("snapshots are written")

    @torch.no_grad()
    def _write_snapshots(self) -> None:
        for average in self.averages:
            own = dict(average.module.named_parameters())
            write_snapshot(
                self.folder,
                average.module,
                profile=Profile(self._step, average.sigma_rel),
                averaged={id(own[name]) for name in self._names},
                dtype=self.dtype,
            )

    def _thin(self) -> None:
        if self.keep is None:
            return
        written = written_snapshots(self.folder)
        kept = thinned([step for step, _ in written], every_n_steps=self._cadence.every_n_steps, keep=self.keep)
        for step, path in written:
            if step not in kept:
                path.unlink()


def _trained(module: pl.LightningModule) -> nn.Module:
    """What a module trains and is sampled from."""
    trained = getattr(module, "trained", None)
    if not isinstance(trained, nn.Module):
        raise ValueError(
            f"got post_hoc_ema with {type(module).__name__}, expected a module that is sampled from, such as "
            "LatentDiffusionModule; leave callback.post_hoc_ema out"
        )
    return trained
