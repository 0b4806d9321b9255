"""Class ids that a network has no row for are refused when a model is built, not by an index error in a step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ldm.conditioners import ClassIds
from ldm.diffusion import Denoiser, Guidance, parameterizations, schedules, times, weightings
from ldm.generation import SamplingSettings
from ldm.networks import DiT, UNet
from ldm.samplers import Euler, Trailing
from ldm.training import LatentDiffusionModule

MakeModule = Callable[..., LatentDiffusionModule]
BATCH = {
    "image": torch.zeros(2, 3, 16, 16),
    "caption": ["", ""],
    "class_label": torch.tensor([0, 2]),
    "position": torch.arange(2),
}


def unet(num_classes: int) -> UNet:
    geometry: dict[str, Any] = {"channel_mult": [1], "num_res_blocks": 1, "attention_resolutions": [], "num_heads": 1}
    return UNet(4, 4, model_channels=8, norm_groups=4, num_classes=num_classes, **geometry)


def dit(num_classes: int) -> DiT:
    return DiT(4, 4, patch_size=2, width=8, depth=1, num_heads=1, num_classes=num_classes)


def build(make: MakeModule, network: nn.Module, *, classes: int, dropout: float) -> LatentDiffusionModule:
    denoiser = Denoiser(
        network,
        schedule=schedules.RectifiedFlow(),
        parameterization=parameterizations.Velocity(),
        weighting=weightings.Unit(),
        times=times.Uniform(),
    )
    return make(
        denoiser=denoiser,
        conditioner=ClassIds(classes),
        condition_dropout=dropout,
        sampling=SamplingSettings(Euler(), Trailing(), Guidance(), num_steps=2, image_size=16),
    )


@pytest.mark.parametrize(
    ("network", "known", "classes", "dropout"),
    [(unet, 3, 3, 0.0), (unet, 4, 3, 1.0), (unet, 5, 3, 1.0), (dit, 3, 3, 1.0), (dit, 5, 3, 1.0)],
)
def test_a_model_that_knows_the_classes_computes_its_loss(
    network: Callable[[int], nn.Module], known: int, classes: int, dropout: float, make_latent_diffusion: MakeModule
) -> None:
    module = build(make_latent_diffusion, network(known), classes=classes, dropout=dropout)
    assert module.loss(BATCH, module.trained, 0, dropout).isfinite().all()


def test_dropout_without_a_row_for_no_class_is_refused(make_latent_diffusion: MakeModule) -> None:
    with pytest.raises(ValueError, match=r"no row for \"no class\".*set network\.num_classes=4, or model\.condition_d"):
        build(make_latent_diffusion, unet(3), classes=3, dropout=0.1)


@pytest.mark.parametrize("network", [unet, dit])
def test_more_classes_than_the_network_knows_are_refused(
    network: Callable[[int], nn.Module], make_latent_diffusion: MakeModule
) -> None:
    with pytest.raises(ValueError, match=r"^got conditioner\.num_classes=4 and network\.num_classes=3, expected"):
        build(make_latent_diffusion, network(3), classes=4, dropout=0.0)
