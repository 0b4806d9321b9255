"""Fine-tuning of pretrained models: LoRA, DreamBooth, textual inversion, or the whole network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ldm.data import ShardDataModule
from ldm.diffusion import Denoiser
from ldm.diffusion.weightings import Weighting
from ldm.generation import SamplingSettings
from ldm.interop import FAMILIES, PretrainedModel, open_model
from ldm.interop.lora_layers import text_encoders
from ldm.interop.model import CarriedConditioner
from ldm.training.compilation import Compilation
from ldm.training.finetune_adapters import Adapter, TextualInversion
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
        optimizer, lr_schedule, sampling, condition_dropout, ema_decay, ema_offload, compile, seed: see
            `LatentDiffusionModule`; without dropout too, guidance works as before.
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
        ema_offload: bool = False,
        compile: Compilation | None = None,
        checkpoint_blocks: bool = False,
        seed: int = 0,
    ) -> None:
        if prior_weight is not None and prior_weight <= 0:
            raise ValueError(f"got prior_weight={prior_weight}, expected a positive number, or null for no prior")
        _check_is_trainable(pretrained)
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
            ema_offload=ema_offload,
            compile=compile,
            seed=seed,
        )
        leave_out_untrained(self.trained)
        self.adapter, self.prior_weight = adapter, prior_weight
        self.train()  # pretrained models come in evaluation mode

    def on_fit_start(self) -> None:
        """Refuses to train for no step, and data that do not fit: without the priors or the new word, too."""
        super().on_fit_start()
        if self.trainer.max_steps == 0:
            raise ValueError("got trainer.max_steps=0, expected at least 1: without a step nothing is learned")

    def _check_data(self, data: ShardDataModule) -> None:
        super()._check_data(data)
        if self.prior_weight is not None:
            _check_priors(data, self.prior_weight)
        if isinstance(self.adapter, TextualInversion):
            captions = (caption for caption, _ in _annotations(data))
            self.adapter.check_captions(captions, self.trained.conditioner)

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


def _check_is_trainable(model: PretrainedModel) -> None:
    """Refuses a network that reads more than latents, and a conditioner that cannot be run: no shards train those."""
    extra = model.network.in_channels - model.autoencoder.latent_channels
    if extra or isinstance(model.conditioner, CarriedConditioner):
        reason = f"whose network reads {extra} channels beside the latents" if extra else "whose conditioner is unknown"
        known = [name for name, family in FAMILIES.items() if not family.signature["extra_channels"]]
        raise ValueError(
            f"checkpoint: got a model of {model.family.name}, {reason}, expected one of {', '.join(known)}; "
            "fine-tune the base model instead"
        )


def _annotations(data: ShardDataModule) -> Iterator[tuple[str, dict[str, Any]]]:
    """The caption and the json of every training sample.

    Raises:
        ValueError: they come as a stream, which cannot be looked through before.
    """
    dataset = data.dataset("train")
    if not hasattr(dataset, "annotation"):
        raise ValueError(
            "got data.mode=stream, expected indexed: priors and a new word are looked for in all samples first"
        )
    return map(dataset.annotation, range(len(dataset)))


def _check_priors(data: ShardDataModule, weight: float) -> None:
    remedy = "write the shards with dataset=folder dataset.class_images=FOLDER, or set model.prior_weight=null"
    if "is_prior" not in data.columns:
        raise ValueError(
            f"got model.prior_weight={weight} and data.columns={list(data.columns)}, expected is_prior among them; "
            f"{remedy}"
        )
    if not any(row.get("is_prior") for _, row in _annotations(data)):
        raise ValueError(
            f"got model.prior_weight={weight} and shards without a picture of the class, expected samples with "
            f"is_prior=1; {remedy}"
        )


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
        distance=denoiser.distance,
        bound_weight=denoiser.bound_weight,
    )
