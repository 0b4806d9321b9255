"""Training of the autoencoder: reconstruction, KL, and an adversary that looks at patches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ldm.autoencoders import KLAutoencoder
from ldm.data import ShardDataModule
from ldm.networks import PatchDiscriminator
from ldm.nn.weights import save_weights
from ldm.training.latent_scale import measure_latent_scale
from ldm.training.losses import adaptive_weight, discriminator_hinge_loss, generator_loss, reconstruction_loss
from ldm.training.randomness import normal


class AutoencoderModule(pl.LightningModule):
    """Trains a KL autoencoder and a patch discriminator, both on every batch (Rombach et al. 2022, appendix G).

    The loss of the generator sees the discriminator's weights detached, so one backward pass serves both networks and
    each parameter gets its gradient once, as distributed training needs. Steps are counted here, by batch:
    `trainer.global_step` is made to agree, although there are two optimizers.

    Args:
        autoencoder, discriminator: what is trained.
        optimizer, discriminator_optimizer: from parameters to an optimizer.
        lr_schedule: from an optimizer to a schedule, stepped with it.
        kl_weight: on the KL divergence in nats an image, against the absolute error summed over an image.
        adversarial_weight: on the generator's loss, times the ratio of gradients (Esser et al. 2021, eq. 7).
        adversarial_start: the step from which the discriminator takes part.
        seed: of the posterior's noise.
    """

    def __init__(
        self,
        autoencoder: KLAutoencoder,
        *,
        discriminator: PatchDiscriminator,
        optimizer: Callable[..., Optimizer],
        discriminator_optimizer: Callable[..., Optimizer],
        lr_schedule: Callable[[Optimizer], LRScheduler],
        kl_weight: float = 1e-6,
        adversarial_weight: float = 0.5,
        adversarial_start: int = 50001,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.autoencoder, self.discriminator = autoencoder, discriminator
        self.make_optimizers = (optimizer, discriminator_optimizer)
        self.make_lr_schedule = lr_schedule
        self.kl_weight, self.adversarial_weight = kl_weight, adversarial_weight
        self.adversarial_start, self.seed = adversarial_start, seed
        self.num_steps = 0

    @property
    def adversary_is_active(self) -> bool:
        """Whether the discriminator takes part in this step."""
        return self.num_steps >= self.adversarial_start

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        optimizers, lr_schedules = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizers, list) and isinstance(lr_schedules, list), "two networks, two of each"
        # Lightning counts every optimizer's steps as global steps; a step here is a batch, so only one counts.
        optimizers[1]._on_before_step = optimizers[1]._on_after_step = _count_nothing
        self.manual_backward(self.loss(batch))
        num_active = 2 if self.adversary_is_active else 1
        for optimizer, lr_schedule in list(zip(optimizers, lr_schedules, strict=True))[:num_active]:
            optimizer.step()
            lr_schedule.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.num_steps += 1

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The sum of both networks' losses; each network has gradients of its own loss only."""
        images = batch["image"]
        reconstructions, kl = self.reconstruct_sampled(images, batch["position"])
        reconstruction = reconstruction_loss(images, reconstructions)
        loss = reconstruction + self.kl_weight * kl
        self.log_dict({"train/reconstruction": reconstruction.detach() / images[0].numel(), "train/kl": kl.detach()})
        self.log("train/loss", loss.detach())
        return loss + self.adversarial_loss(images, reconstructions, reconstruction)

    def reconstruct_sampled(self, images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(reconstructions (B, 3, H, W) through a sample of the posterior, mean KL divergence in nats)."""
        moments = self.autoencoder.encode(images)
        channels, *size = moments.shape[1:]
        noise = normal(self.seed, positions, (channels // 2, *size))
        latents = self.autoencoder.to_latents(moments, noise=noise)
        return self.autoencoder.decode(latents), self.autoencoder.posterior(moments).kl().mean()

    def adversarial_loss(self, images: Tensor, reconstructions: Tensor, reconstruction: Tensor) -> Tensor:
        """The generator's and the discriminator's losses, whose gradients do not mix."""
        if not self.adversary_is_active:
            # Zero gradients for the idle network: distributed training waits for every parameter's.
            return 0.0 * torch.stack([p.sum() for p in self.discriminator.parameters()]).sum()
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        generator = generator_loss(functional_call(self.discriminator, fixed, (reconstructions,)))
        weight = self.adversarial_weight * adaptive_weight(reconstruction, generator, self.autoencoder.last_layer)
        discriminator = discriminator_hinge_loss(
            self.discriminator(images), self.discriminator(reconstructions.detach())
        )
        self.log_dict({"train/generator": generator.detach(), "train/discriminator": discriminator.detach()})
        return weight * generator + discriminator

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Absolute error a pixel and peak signal-to-noise ratio in dB of the posterior's mean."""
        images, reconstructions = batch["image"], self.reconstruct(batch["image"])
        mean_square = ((images - reconstructions) / 2).square().flatten(1).mean(1)
        values = {
            "val/reconstruction": (images - reconstructions).abs().mean(),
            "val/psnr": -10 * mean_square.clamp_min(1e-10).log10().mean(),
        }
        self.log_dict(values, sync_dist=True, batch_size=len(images))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) through the posterior's mean and back, clipped to [-1, 1]."""
        moments = self.autoencoder.encode(images)
        return self.autoencoder.decode(self.autoencoder.to_latents(moments, noise=None)).clamp(-1, 1)

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        networks = (self.autoencoder, self.discriminator)
        optimizers = [make(list(net.parameters())) for make, net in zip(self.make_optimizers, networks, strict=True)]
        return optimizers, [self.make_lr_schedule(optimizer) for optimizer in optimizers]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["num_steps"] = self.num_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.num_steps = checkpoint["num_steps"]

    def finish(self, folder: Path, *, data: ShardDataModule, config: dict[str, Any]) -> dict[str, Any]:
        """Measures the latent scale over the whole training set, on all ranks, and writes the autoencoder with it."""
        self.to(self.trainer.strategy.root_device)
        shift, scale = measure_latent_scale(self.autoencoder, data)
        self.autoencoder.set_latent_scale(scale, shift)
        path = folder / "autoencoder.safetensors"
        geometry = {name: value for name, value in config["autoencoder"].items() if not name.startswith("_")}
        if self.global_rank == 0:
            save_weights(path, self.autoencoder.state_dict(), target=config["autoencoder"]["_target_"], config=geometry)
        return {"autoencoder": path.name, "latent_scale": scale, "latent_shift": shift}


def _count_nothing() -> None:
    """Takes the place of Lightning's hook that counts an optimizer's steps."""
