"""Fine-tuning of pretrained models: LoRA, DreamBooth, textual inversion, or the whole network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ldm.diffusion import Denoiser
from ldm.diffusion.weightings import Weighting
from ldm.generation import SamplingSettings
from ldm.interop import PretrainedModel, open_model
from ldm.interop.lora_layers import text_encoders
from ldm.training.finetune_adapters import Adapter
from ldm.training.frozen import leave_out_untrained
from ldm.training.latent_diffusion import LatentDiffusionModule, Trained


def pretrained(path: str | None, *, prediction: str | None = None, family: str | None = None) -> PretrainedModel:
    """The model to start from, in float32: what `ldm.interop.open_model` reads.

    Raises:
        ValueError: no path is given, or there is no such model.
    """
    if path is None:
        raise ValueError("checkpoint: got none, expected a file or folder to start from; give checkpoint=PATH")
    model = open_model(path, prediction=prediction, family=family)
    model.network.float()
    model.conditioner.float()
    model.autoencoder.float()
    return model


class Finetuning(LatentDiffusionModule):
    """Trains an adapter of a pretrained model, or, without one, its whole network; all else is frozen.

    Checkpoints and weights hold what is trained; the rest comes from the pretrained file again.

    Args:
        pretrained: the model to start from; it is changed in place.
        adapter: what is trained; None is the network.
        weighting: of the loss; None is the family's own, the plain error of the network's output.
        prior_weight: of the loss of samples whose column `is_prior` is 1 (DreamBooth, Ruiz et al. 2023, eq. 2); None
            where there are none.
        checkpoint_blocks: recompute the network's blocks in the backward pass: less memory, a third more time.
        optimizer, lr_schedule, sampling, condition_dropout, ema_decay, seed: see `LatentDiffusionModule`; without
            dropout too, guidance works as before.
    """

    knows_null = True

    def __init__(
        self,
        pretrained: PretrainedModel,
        *,
        adapter: Adapter | None,
        optimizer: Callable[..., Optimizer],
        lr_schedule: Callable[[Optimizer], LRScheduler],
        sampling: SamplingSettings,
        weighting: Weighting | None = None,
        condition_dropout: float = 0.0,
        prior_weight: float | None = None,
        ema_decay: float = 0.99,
        checkpoint_blocks: bool = False,
        seed: int = 0,
    ) -> None:
        if prior_weight is not None and prior_weight <= 0:
            raise ValueError(f"got prior_weight={prior_weight}, expected a positive number, or null for no prior")
        denoiser, conditioner = _reweighted(pretrained.denoiser, weighting), pretrained.conditioner
        if adapter is None:
            conditioner.requires_grad_(False)
            denoiser.network.requires_grad_(True)
        else:
            adapter.attach(denoiser, conditioner)
        pretrained.network.checkpoint_blocks = checkpoint_blocks
        for _, encoder in text_encoders(conditioner):
            encoder.is_frozen = not any(parameter.requires_grad for parameter in encoder.parameters())
        super().__init__(
            denoiser,
            conditioner=conditioner,
            autoencoder=pretrained.autoencoder,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            sampling=sampling,
            condition_dropout=condition_dropout,
            ema_decay=ema_decay,
            seed=seed,
        )
        leave_out_untrained(self.trained)
        self.adapter, self.prior_weight = adapter, prior_weight
        self.train()  # pretrained models come in evaluation mode

    def on_fit_start(self) -> None:
        """Refuses data of another autoencoder, or such as does not tell priors where those have a weight."""
        super().on_fit_start()
        columns = getattr(self.trainer.datamodule, "columns", ())  # type: ignore[attr-defined]
        if self.prior_weight is not None and "is_prior" not in columns:
            raise ValueError(
                f"got model.prior_weight={self.prior_weight} and data.columns={list(columns)}, expected is_prior among "
                "them; write the shards with dataset=folder dataset.class_images=FOLDER"
            )

    def loss(self, batch: dict[str, Any], model: Trained, seed: int, condition_dropout: float) -> Tensor:
        """The diffusion loss (B,) of a batch; that of priors has a weight of its own."""
        loss = super().loss(batch, model, seed, condition_dropout)
        if self.prior_weight is None:
            return loss
        return torch.where(batch["is_prior"] != 0, self.prior_weight * loss, loss)

    def finish(self, folder: Path, *, data: pl.LightningDataModule, config: dict[str, Any]) -> dict[str, Any]:
        """Writes the moving average as weights to use, and the adapter as a file for other tools."""
        written = super().finish(folder, data=data, config=_with_whole_path(config))
        if self.adapter is None or self.global_rank:
            return written
        model = self.ema.module
        return {**written, **self.adapter.write(model.denoiser, model.conditioner, folder)}


def _with_whole_path(config: dict[str, Any]) -> dict[str, Any]:
    """The run's config with the pretrained model's path from the root, so that it is found from any folder."""
    model = config["model"]
    source = model.get("pretrained", {})
    if not source.get("path"):
        return config
    whole = str(Path(source["path"]).expanduser().absolute())
    return {**config, "model": {**model, "pretrained": {**source, "path": whole}}}


def _reweighted(denoiser: Denoiser, weighting: Weighting | None) -> Denoiser:
    """The same denoiser with another loss weight."""
    if weighting is None:
        return denoiser
    return Denoiser(
        denoiser.network,
        schedule=denoiser.schedule,
        parameterization=denoiser.parameterization,
        weighting=weighting,
        times=denoiser.times,
    )
