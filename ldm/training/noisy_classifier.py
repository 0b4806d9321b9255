"""Training of the classifier of noisy samples that guides a sampler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ldm.autoencoders import Autoencoder, encode_safely
from ldm.diffusion.denoiser import per_sample
from ldm.diffusion.schedules import Schedule
from ldm.diffusion.times import Times
from ldm.networks import NoisyClassifier
from ldm.nn.weights import save_weights
from ldm.training.clipping import Clipped
from ldm.training.frozen import drop_frozen, freeze, restore_frozen
from ldm.training.latent_diffusion import VALIDATION_SEED
from ldm.training.randomness import draw


class NoisyClassifierModule(Clipped):
    """Trains a classifier on the noised latents of a frozen autoencoder (Dhariwal & Nichol 2021, section 4.3).

    Args:
        classifier: what is trained.
        autoencoder: frozen; the one of the diffusion model that is to be guided.
        schedule, times: of that model.
        optimizer: from parameters to an optimizer.
        lr_schedule: from the optimizer to a schedule, stepped once an optimizer step.
        column: of the batch, with labels from 0 on.
        seed: of noise and times; with a sample's position in the stream it decides both.

    Raises:
        ValueError: times that do not fit the schedule.
    """

    def __init__(
        self,
        classifier: NoisyClassifier,
        *,
        autoencoder: Autoencoder,
        schedule: Schedule,
        times: Times,
        optimizer: Callable[..., Optimizer],
        lr_schedule: Callable[[Optimizer], LRScheduler],
        column: str = "class_label",
        seed: int = 0,
    ) -> None:
        super().__init__()
        times.check(schedule)
        self.classifier, self.autoencoder = classifier, freeze(autoencoder)
        self.schedule, self.times, self.column, self.seed = schedule, times, column, seed
        self.make_optimizer, self.make_lr_schedule = optimizer, lr_schedule

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(*self.told(batch, self.seed))
        self.log("train/loss", loss, batch_size=len(batch[self.column]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The loss, and the share of noisy samples whose class is named right, with the same noise every time."""
        logits, labels = self.told({**batch, "position": batch["index"]}, VALIDATION_SEED)
        found = {
            "val/loss": F.cross_entropy(logits, labels),
            "val/accuracy": (logits.argmax(1) == labels).float().mean(),
        }
        self.log_dict(found, sync_dist=True, batch_size=len(labels))

    def told(self, batch: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
        """(Logits (B, K), labels (B,)) of a batch, noised."""
        if self.column not in batch:
            raise ValueError(f"got batches without {self.column}, expected labels there; add it to data.columns")
        labels = torch.as_tensor(batch[self.column], device=self.device)
        with torch.no_grad():
            moments = batch["moments"] if "moments" in batch else encode_safely(self.autoencoder, batch["image"])
            random = draw(seed, batch["position"], (self.autoencoder.latent_channels, *moments.shape[2:]))
            x_0 = self.autoencoder.to_latents(moments, noise=random.posterior)
            t = self.times(random.u, self.schedule)
            factor = per_sample(t, x_0)
            x_t = self.schedule.alpha(factor) * x_0 + self.schedule.sigma(factor) * random.eps
            x_in, time = x_t * self.schedule.input_scale(factor), self.schedule.network_time(t)
        return self.classifier(x_in, time).float(), labels

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.clippable(self.make_optimizer)(list(self.classifier.parameters()))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_lr_schedule(optimizer), "interval": "step"},
        }

    def train(self, mode: bool = True) -> NoisyClassifierModule:
        super().train(mode)
        self.autoencoder.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = drop_frozen(self, checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = restore_frozen(self, checkpoint["state_dict"])

    def finish(self, folder: Path, *, data: pl.LightningDataModule, config: dict[str, Any]) -> dict[str, Any]:
        """Writes the classifier as weights to use."""
        path = folder / "weights.safetensors"
        if self.global_rank == 0:
            state = self.classifier.state_dict()
            save_weights(path, state, target="ldm.training.NoisyClassifierModule", config=config)
        return {"classifier": path.name}
