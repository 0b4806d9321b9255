"""Training of the autoencoder: reconstruction, perception, regularisation, and an adversary that looks at patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ldm.autoencoders import Autoencoder, KLAutoencoder, VQAutoencoder
from ldm.data import ShardDataModule
from ldm.metrics import CodebookUsage
from ldm.networks import PatchDiscriminator
from ldm.nn.weights import save_weights
from ldm.training.frozen import drop_frozen, freeze, restore_frozen
from ldm.training.latent_scale import measure_latent_scale
from ldm.training.losses import (
    adaptive_weight,
    discriminator_hinge_loss,
    generator_loss,
    half_precision_scales,
    reconstruction_loss,
)
from ldm.training.randomness import normal

# Rombach et al. 2022, appendix G, and the configs of its code.
PUBLISHED_WEIGHTS = {"kl": 1e-6, "quantization": 1.0}


class AutoencoderModule(pl.LightningModule):
    """Trains an autoencoder and a patch discriminator, both on every batch (Rombach et al. 2022, appendix G).

    The loss of the generator sees the discriminator's weights detached, so one backward pass serves both networks and
    each parameter gets its gradient once, as distributed training needs. Steps are counted here, by batch:
    `trainer.global_step` is made to agree, although there are two optimizers.

    Args:
        autoencoder, discriminator: what is trained.
        perceptual: distance (B,) between images and reconstructions, frozen, such as `ldm.metrics.LPIPS`; None: none.
        optimizer, discriminator_optimizer: from parameters to an optimizer.
        lr_schedule: from an optimizer to a schedule, stepped with it.
        kl_weight: of a KL autoencoder, on the divergence in nats an image, against the absolute error summed over an
            image; None is 1e-6.
        quantization_weight: of a VQ autoencoder, on its codebook and commitment loss, against the mean absolute error;
            None is 1.
        perceptual_weight: on the perceptual distance, added to the absolute error of every value of an image.
        adversarial_weight: on the generator's loss, times the ratio of gradients (Esser et al. 2021, eq. 7).
        adversarial_start: the step from which the discriminator takes part.
        seed: of the posterior's noise.

    Raises:
        ValueError: a weight for a loss that this autoencoder does not have.
    """

    def __init__(
        self,
        autoencoder: KLAutoencoder | VQAutoencoder,
        *,
        discriminator: PatchDiscriminator,
        perceptual: nn.Module | None = None,
        optimizer: Callable[..., Optimizer],
        discriminator_optimizer: Callable[..., Optimizer],
        lr_schedule: Callable[[Optimizer], LRScheduler],
        kl_weight: float | None = None,
        quantization_weight: float | None = None,
        perceptual_weight: float = 1.0,
        adversarial_weight: float = 0.5,
        adversarial_start: int = 50001,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.autoencoder, self.discriminator = autoencoder, discriminator
        self.perceptual = None if perceptual is None else freeze(perceptual)
        self.make_optimizers = (optimizer, discriminator_optimizer)
        self.make_lr_schedule = lr_schedule
        self.regularization_weight = chosen_weight(autoencoder, kl=kl_weight, quantization=quantization_weight)
        self.perceptual_weight, self.adversarial_weight = perceptual_weight, adversarial_weight
        self.adversarial_start, self.seed = adversarial_start, seed
        self.codebook_usage = (
            CodebookUsage(autoencoder.quantize.num_codes) if isinstance(autoencoder, VQAutoencoder) else None
        )
        self.num_steps = 0

    def on_fit_start(self) -> None:
        """Refuses pictures of a size that the autoencoder does not divide."""
        data, unit = self.trainer.datamodule, self.autoencoder.downsampling_factor  # type: ignore[attr-defined]
        size, buckets = getattr(data, "resolution", None), getattr(data, "buckets", None)
        if size is not None and size % unit:
            raise ValueError(
                f"got data.resolution={size}, expected a multiple of {unit}, which the autoencoder divides by; "
                f"set data.resolution={max(unit, round(size / unit) * unit)}"
            )
        for width, height in buckets.sizes if buckets is not None else ():
            if width % unit or height % unit:
                raise ValueError(
                    f"got data.buckets with {height} x {width}, expected multiples of {unit}, which the autoencoder "
                    "divides by"
                )

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
        with one_scale(self.trainer):
            for optimizer, lr_schedule in list(zip(optimizers, lr_schedules, strict=True))[:num_active]:
                optimizer.step()
                lr_schedule.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.num_steps += 1

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The sum of both networks' losses; each network has gradients of its own loss only."""
        images, name = batch["image"], self.autoencoder.regularization
        reconstructions, regularization = self.reconstruct_sampled(images, batch["position"])
        reconstruction = self.reconstruction_loss(images, reconstructions)
        loss = reconstruction + self.regularization_weight * regularization
        error = reconstruction_loss(images.detach(), reconstructions.detach(), per="value")
        self.log_dict({"train/reconstruction": error, f"train/{name}": regularization.detach()})
        self.log("train/loss", loss.detach())
        return loss + self.adversarial_loss(images, reconstructions, reconstruction)

    def reconstruction_loss(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Absolute error and perceptual distance, in the autoencoder's unit: a sum over an image, or a mean."""
        unit = self.autoencoder.loss_unit
        error = reconstruction_loss(images, reconstructions, per=unit)
        if self.perceptual is None:
            return error
        distance = self.perceptual(images, reconstructions).mean()
        self.log("train/perceptual", distance.detach())
        num_values = images[0].numel() if unit == "image" else 1
        return error + self.perceptual_weight * num_values * distance

    def reconstruct_sampled(self, images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(Reconstructions (B, 3, H, W) through sampled latents, the autoencoder's regularisation loss)."""
        noise = normal(self.seed, positions, self.autoencoder.latent_shape(images))
        return self.autoencoder(images, noise=noise)

    def adversarial_loss(self, images: Tensor, reconstructions: Tensor, reconstruction: Tensor) -> Tensor:
        """The generator's and the discriminator's losses, whose gradients do not mix."""
        if not self.adversary_is_active:
            # Zero gradients for the idle network: distributed training waits for every parameter's.
            return 0.0 * torch.stack([p.sum() for p in self.discriminator.parameters()]).sum()
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        generator = generator_loss(functional_call(self.discriminator, fixed, (reconstructions,)))
        scales = half_precision_scales(images, per=self.autoencoder.loss_unit)
        balance = adaptive_weight(reconstruction, generator, self.autoencoder.last_layer, scales=scales)
        discriminator = discriminator_hinge_loss(
            self.discriminator(images), self.discriminator(reconstructions.detach())
        )
        self.log_dict({"train/generator": generator.detach(), "train/discriminator": discriminator.detach()})
        return self.adversarial_weight * balance * generator + discriminator

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Absolute error a pixel and peak signal-to-noise ratio in dB of the mean latents; counts codes in use."""
        images, moments = batch["image"], self.autoencoder.encode(batch["image"])
        if isinstance(self.autoencoder, VQAutoencoder):
            assert self.codebook_usage is not None
            self.codebook_usage.update(self.autoencoder.codes(moments))
        reconstructions = self.decode_mean(moments)
        mean_square = ((images - reconstructions) / 2).square().flatten(1).mean(1)
        values = {
            "val/reconstruction": (images - reconstructions).abs().mean(),
            "val/psnr": -10 * mean_square.clamp_min(1e-10).log10().mean(),
        }
        self.log_dict(values, sync_dist=True, batch_size=len(images))

    def on_validation_epoch_end(self) -> None:
        if self.codebook_usage is None:
            return
        usage, perplexity = self.codebook_usage.compute()
        self.codebook_usage.reset()
        # The metric has added up the ranks already; their mean is what each of them has.
        self.log_dict({"val/codebook_usage": usage.float(), "val/perplexity": perplexity.float()}, sync_dist=True)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) through the mean latents and back, clipped to [-1, 1]."""
        return self.decode_mean(self.autoencoder.encode(images))

    def decode_mean(self, moments: Tensor) -> Tensor:
        """Images (B, 3, H, W) of the mean latents of moments (B, M, h, w), clipped to [-1, 1]."""
        return self.autoencoder.decode(self.autoencoder.to_latents(moments, noise=None)).clamp(-1, 1)

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        networks = (self.autoencoder, self.discriminator)
        optimizers = [make(list(net.parameters())) for make, net in zip(self.make_optimizers, networks, strict=True)]
        return optimizers, [self.make_lr_schedule(optimizer) for optimizer in optimizers]

    def train(self, mode: bool = True) -> AutoencoderModule:
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = drop_frozen(self, checkpoint["state_dict"])
        checkpoint["num_steps"] = self.num_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = restore_frozen(self, checkpoint["state_dict"])
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


def chosen_weight(autoencoder: Autoencoder, **weights: float | None) -> float:
    """The weight on the autoencoder's regularisation loss, by the name of that loss; None is the published one.

    Raises ValueError for the weight of a loss that this autoencoder does not have.
    """
    name = autoencoder.regularization
    strange = [f"{other}_weight={weight}" for other, weight in weights.items() if other != name and weight is not None]
    if strange:
        raise ValueError(
            f"got {', '.join(strange)} for a {type(autoencoder).__name__}, expected {name}_weight, since its loss is "
            f"{name}; leave the other out (~model.{strange[0].partition('=')[0]})"
        )
    weight = weights[name]
    return PUBLISHED_WEIGHTS[name] if weight is None else weight


@contextmanager
def one_scale(trainer: pl.Trainer) -> Iterator[None]:
    """Keeps the float16 scale of the loss as it is until all optimizers have stepped.

    Lightning moves it behind each, so that the next one would take another scale off than the backward pass put on.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        yield
        return
    scaler.update = _count_nothing
    try:
        yield
    finally:
        del scaler.update  # the class's own is seen again
    scaler.update()


def _count_nothing() -> None:
    """Takes the place of what Lightning calls behind each optimizer's step."""
