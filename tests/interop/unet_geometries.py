"""The geometries under conf/network, as published and at a width that a test can compute."""

from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from hypothesis import strategies as st
from torch import Tensor, nn

from ldm.networks import UNet

CONF = Path(__file__).parents[2] / "conf" / "network"


def published(name: str) -> dict[str, Any]:
    """Constructor arguments of conf/network/NAME.yaml; a width that another config holds is 48."""
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    del config["_target_"]
    return {key: 48 if str(value).startswith("${") else value for key, value in config.items()}


NAMES = sorted(path.stem for path in CONF.glob("*.yaml") if "ldm.networks.UNet\n" in path.read_text())
# Several heads by number at several widths over pixels: diffusers has one width for all heads of a UNet2DModel.
HEADS_BY_NUMBER_OVER_PIXELS = ["ldm_churches", "ldm_inpainting_big"]
HELD_BY_DIFFUSERS = [name for name in NAMES if name not in HEADS_BY_NUMBER_OVER_PIXELS]


def tiny(name: str) -> dict[str, Any]:
    """The same structure, but narrow."""
    narrow = {"model_channels": 32, "num_head_channels": 8, "context_dim": 24, "num_classes": 9, "vector_dim": 58}
    arguments = published(name)
    return arguments | {key: value for key, value in narrow.items() if key in arguments}


def on_meta(arguments: dict[str, Any]) -> UNet:
    with torch.device("meta"):
        return UNet(**arguments)


def seeded(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_unet(arguments: dict[str, Any]) -> UNet:
    """A network without zero-initialised branches, so that all of it takes part."""
    unet = UNet(**arguments).eval()
    with torch.no_grad():
        for index, parameter in enumerate(unet.parameters()):
            parameter += 0.05 * seeded(tuple(parameter.shape), index)
    return unet


def other_model(name: str, config: dict[str, Any], state: dict[str, Tensor] | None = None) -> nn.Module:
    """diffusers' model of that class, with the weights, or on the meta device without."""
    cls = getattr(diffusers, name)
    if state is None:
        with torch.device("meta"):
            return cls(**config)
    model = cls(**config).eval()
    model.load_state_dict(state)
    return model


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    """Any structure that the constructor takes, a few channels wide."""
    levels = draw(st.integers(1, 4))

    def by_level(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=levels, max_size=levels))

    context = draw(st.booleans())
    with_context = {
        "context_dim": 20,
        "transformer_depth": by_level(st.integers(1, 3)),
        "use_linear_projection": draw(st.booleans()),
        "disable_self_attention": by_level(st.booleans()),
    }
    return {
        "in_channels": draw(st.integers(1, 5)),
        "out_channels": draw(st.integers(1, 5)),
        "model_channels": 8,
        "channel_mult": by_level(st.integers(1, 3)),
        "num_res_blocks": by_level(st.integers(1, 3)),
        "attention_resolutions": [2**level for level, yes in enumerate(by_level(st.booleans())) if yes],
        "num_heads": 2,
        "use_scale_shift_norm": draw(st.booleans()),
        "resblock_updown": levels > 1 and draw(st.booleans()),
        "norm_groups": 4,
        **(with_context if context else {}),
        **draw(st.sampled_from([{}, {"num_classes": 7}, {"vector_dim": 12}])),
    }
