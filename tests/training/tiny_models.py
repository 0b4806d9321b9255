"""Modules of a few thousand parameters, and data for them, that train in a moment."""

import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from ldm.autoencoders import KLAutoencoder, VQAutoencoder
from ldm.conditioners import OpenCLIPText, TextTransformer, WordTokenizer
from ldm.data import Record, write_shards
from ldm.diffusion import Denoiser, Guidance, parameterizations, schedules, times, weightings
from ldm.generation import SamplingSettings
from ldm.networks import MicroDiT, PatchDiscriminator, UNet
from ldm.samplers import Euler, Trailing
from ldm.training import AutoencoderModule, LatentDiffusionModule
from ldm.training.optim import constant

COLOURS = {"red": (200, 20, 20), "blue": (20, 20, 220), "green": (20, 180, 40)}


def fill(module: nn.Module) -> None:
    """Random numbers for every matrix, also for those that start as zero, by name: not by the order of building."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.add_(1)


def tiny_autoencoder() -> KLAutoencoder:
    """4 latent channels at half the resolution."""
    autoencoder = KLAutoencoder(base_channels=8, channel_mult=[1, 2], num_res_blocks=1, norm_groups=4, latent_scale=0.8)
    fill(autoencoder)
    return autoencoder


def tiny_quantized(**options: Any) -> VQAutoencoder:
    """As `tiny_autoencoder`, with a codebook whose entries are of the size of latents; options replace arguments."""
    geometry = {"base_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4}
    autoencoder = VQAutoencoder(**{"latent_channels": 4, "num_codes": 32, **geometry, **options})
    fill(autoencoder)
    autoencoder.quantize.embedding.weight.data *= 2
    return autoencoder


def tiny_denoiser() -> Denoiser:
    """Rectified flow over latents of `tiny_autoencoder` under a context of width 8."""
    network = UNet(
        4,
        4,
        model_channels=8,
        channel_mult=[1, 2],
        num_res_blocks=1,
        attention_resolutions=[2],
        num_heads=2,
        context_dim=8,
        norm_groups=4,
    )
    fill(network)
    return Denoiser(
        network,
        schedule=schedules.RectifiedFlow(),
        parameterization=parameterizations.Velocity(),
        weighting=weightings.Unit(),
        times=times.LogitNormal(),
    )


def tiny_conditioner() -> TextTransformer:
    """Captions of the names of colours."""
    conditioner = TextTransformer(WordTokenizer(list(COLOURS), length=4), width=8, depth=1, num_heads=2)
    fill(conditioner)
    return conditioner


def latent_diffusion_module(**options: Any) -> LatentDiffusionModule:
    """A latent-diffusion module; options replace its arguments."""
    sampling = SamplingSettings(Euler(), Trailing(), Guidance(scale=2.0), num_steps=2, image_size=16)
    defaults: dict[str, Any] = {
        "denoiser": tiny_denoiser(),
        "conditioner": tiny_conditioner(),
        "autoencoder": tiny_autoencoder(),
        "optimizer": partial(torch.optim.AdamW, lr=1e-3),
        "lr_schedule": constant,
        "sampling": sampling,
        "ema_decay": 0.5,
        "seed": 7,
    }
    return LatentDiffusionModule(**(defaults | options))


def patch_dropping_module(**options: Any) -> LatentDiffusionModule:
    """The same with a transformer that answers for half of the patches in training, under captions read whole."""
    network = MicroDiT(
        *(4, 4),
        patch_size=2,
        width=16,
        depth=3,
        head_width=8,
        mixer_width=8,
        mixer_depth=2,
        context_dim=8,
        num_experts=2,
        drop_patches=0.5,
    )
    fill(network)
    conditioner = OpenCLIPText(8, 1, 1, layer="last", quick_gelu=True, null="zeros")
    fill(conditioner)
    denoiser = Denoiser(
        network,
        schedule=schedules.EDM(sigma_data=0.9),
        parameterization=parameterizations.EDM(),
        weighting=weightings.EDM(sigma_data=0.9),
        times=times.LogNormal(p_mean=-0.6, p_std=1.2),
    )
    return latent_diffusion_module(**({"denoiser": denoiser, "conditioner": conditioner} | options))


def autoencoder_module(**options: Any) -> AutoencoderModule:
    """A module of an autoencoder and a discriminator of 2 layers; options replace its arguments."""
    discriminator = PatchDiscriminator(base_channels=32, num_layers=1, norm="group")
    fill(discriminator)
    defaults: dict[str, Any] = {
        "autoencoder": tiny_autoencoder(),
        "discriminator": discriminator,
        "optimizer": partial(torch.optim.Adam, lr=1e-3),
        "discriminator_optimizer": partial(torch.optim.Adam, lr=1e-3),
        "lr_schedule": constant,
        "kl_weight": 1e-3,
        "adversarial_weight": 0.5,
        "adversarial_start": 2,
        "seed": 7,
    }
    return AutoencoderModule(**(defaults | options))


def vq_autoencoder_module(**options: Any) -> AutoencoderModule:
    """The same on a codebook."""
    return autoencoder_module(**({"autoencoder": tiny_quantized(), "kl_weight": None} | options))


def write_colours(folder: Path, num_samples: int = 24, *, prefix: str = "") -> None:
    """Shards of noisy 16 x 16 pictures of one colour, whose captions name it, after a prefix."""
    random = np.random.default_rng(0)

    def records() -> Any:
        for i in range(num_samples):
            name, colour = list(COLOURS.items())[i % len(COLOURS)]
            noise = random.integers(-20, 21, (16, 16, 3))
            yield Record((np.array(colour) + noise).clip(0, 255).astype(np.uint8), prefix + name, {"number": i})

    write_shards(folder, records(), samples_per_shard=10)


def quiet_trainer(**options: Any) -> pl.Trainer:
    """A trainer on the CPU that says and writes nothing."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(**(defaults | options))


class Losses(pl.Callback):
    """Keeps what training logs, step by step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.rows.append({name: value.item() for name, value in trainer.callback_metrics.items()})
