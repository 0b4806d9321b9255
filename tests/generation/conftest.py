import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ldm.autoencoders import KLAutoencoder
from ldm.conditioners import TextTransformer, WordTokenizer
from ldm.diffusion import Denoiser, Guidance, parameterizations, schedules, times, weightings
from ldm.generation import Pipeline, SamplingSettings
from ldm.networks import UNet
from ldm.samplers import DDIM, Trailing


def fill(module: nn.Module) -> None:
    """Random numbers for every matrix, also for those that start as zero, by name: a network that does something."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)


@pytest.fixture
def make_pipeline() -> Callable[..., Pipeline]:
    """Builds an untrained model for 16 x 16 pictures; options replace parts, network arguments or settings."""

    def make(**options: Any) -> Pipeline:
        torch.manual_seed(0)
        words = WordTokenizer(["red", "blue", "seven"], length=5)
        conditioner = options.pop("conditioner", None) or TextTransformer(words, width=8, depth=1, num_heads=2)
        autoencoder = options.pop("autoencoder", None) or KLAutoencoder(
            base_channels=8, channel_mult=[1, 2], num_res_blocks=1, norm_groups=4
        )
        channels = autoencoder.latent_channels
        network = UNet(
            options.pop("in_channels", channels), channels, model_channels=8, channel_mult=[1, 2], num_res_blocks=1,
            attention_resolutions=[1, 2], num_heads=2, context_dim=options.pop("context_dim", 8), norm_groups=4,
            num_classes=options.pop("num_classes", None),
        )  # fmt: skip
        denoiser = Denoiser(
            network,
            schedule=options.pop("schedule", schedules.RectifiedFlow()),
            parameterization=parameterizations.Velocity(),
            weighting=weightings.Unit(),
            times=times.Uniform(),
        )
        for module in (network, conditioner, autoencoder):
            fill(module)
            module.eval()
        defaults: dict[str, Any] = {
            "sampler": DDIM(eta=1.0),
            "discretization": Trailing(),
            "guidance": Guidance(scale=2.0),
            "num_steps": 4,
            "image_size": 16,
        }
        settings = SamplingSettings(**(defaults | options))
        return Pipeline(denoiser, conditioner=conditioner, autoencoder=autoencoder, settings=settings)

    return make
