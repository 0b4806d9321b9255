"""The networks under conf/network against the sizes, tensors and names of the published ones, on the meta device."""

import importlib
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

CONF = Path(__file__).parents[2] / "conf" / "network"

# Millions of parameters of the U-Net alone, to the published digit.
MILLIONS = {
    "sd1": "859.52",
    "sd2": "865.91",
    "sd_depth": "865.91",
    "sd_inpainting": "865.93",
    "sd_x4": "473.40",
    "sdxl_base": "2567.46",
    "sdxl_refiner": "2259.53",
    "ldm_celebahq": "274.06",
    "ldm_churches": "294.97",
    "ldm_cin_f8": "394.98",
    "ldm_cin256_v2": "400.92",
    "ldm_txt2img": "872.30",
    "ldm_text2img256": "403.62",
    "ldm_layout": "246.28",
    "ldm_bsr_sr": "113.62",
    "ldm_inpainting_big": "387.25",
    "ldm_semantic": "215.23",
}
TENSORS = {"sd1": 686, "sd2": 686, "sdxl_base": 1680, "sdxl_refiner": 1220}


def build(name: str, **changes: object) -> nn.Module:
    """Build the network of conf/network/NAME.yaml on the meta device."""
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    module, _, attribute = config.pop("_target_").rpartition(".")
    with torch.device("meta"):
        return getattr(importlib.import_module(module), attribute)(**{**config, **changes})


def millions(network: nn.Module) -> str:
    """Size of the network as the papers print it."""
    return f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.2f}"


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_count_is_the_published_one(name: str) -> None:
    assert millions(build(name)) == MILLIONS[name]


@pytest.mark.parametrize("name", TENSORS)
def test_number_of_tensors_is_the_published_one(name: str) -> None:
    assert len(build(name).state_dict()) == TENSORS[name]


# Published networks that differ from one under conf/network by a number.
VARIANTS = {
    "unCLIP-H": ("sd2", {"vector_dim": 2048}, "870.17"),
    "unCLIP-L": ("sd2", {"vector_dim": 1536}, "869.52"),
    "retrieval-augmented 768": (
        "ldm_cin_f8",
        {"in_channels": 16, "out_channels": 16, "model_channels": 448, "channel_mult": [1, 2, 3, 4],
         "context_dim": 768},
        "1335.48",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count_of_a_variant_is_the_published_one(name: str) -> None:
    base, changes, size = VARIANTS[name]

    assert millions(build(base, **changes)) == size


# Tensors at the places where layouts differ: names and shapes as in the released checkpoints.
SHAPES = {
    "sd1": {
        "time_embed.0.weight": (1280, 320),
        "time_embed.2.weight": (1280, 1280),
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.0.in_layers.0.weight": (320,),
        "input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
        "input_blocks.1.0.emb_layers.1.weight": (320, 1280),
        "input_blocks.1.0.out_layers.3.weight": (320, 320, 3, 3),
        "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.bias": (320,),
        "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
        "input_blocks.1.1.transformer_blocks.0.ff.net.2.weight": (320, 1280),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "middle_block.1.proj_out.weight": (1280, 1280, 1, 1),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.8.2.conv.weight": (640, 640, 3, 3),
        "output_blocks.8.0.skip_connection.weight": (640, 960, 1, 1),
        "out.0.weight": (320,),
        "out.2.weight": (4, 320, 3, 3),
    },
    "sd2": {
        "input_blocks.1.1.proj_in.weight": (320, 320),
        "middle_block.1.transformer_blocks.0.attn2.to_v.weight": (1280, 1024),
    },
    "sdxl_base": {
        "label_emb.0.0.weight": (1280, 2816),
        "label_emb.0.2.weight": (1280, 1280),
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "middle_block.1.transformer_blocks.9.attn1.to_q.weight": (1280, 1280),
        "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (640, 640, 3, 3),
    },
    "sd_x4": {
        "label_emb.weight": (1000, 1024),
        "input_blocks.4.1.transformer_blocks.0.attn1.to_k.weight": (512, 1024),
        "middle_block.1.transformer_blocks.0.attn1.to_k.weight": (1024, 1024),
    },
    "ldm_celebahq": {
        "input_blocks.4.1.qkv.weight": (1344, 448, 1),
        "input_blocks.4.1.proj_out.weight": (448, 448, 1),
    },
    "ldm_churches": {
        "input_blocks.1.0.emb_layers.1.weight": (384, 768),
        "input_blocks.3.0.in_layers.2.weight": (192, 192, 3, 3),
        "output_blocks.2.1.out_layers.3.weight": (768, 768, 3, 3),
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_tensors_have_their_published_names_and_shapes(name: str) -> None:
    shapes = {key: tuple(value.shape) for key, value in build(name).state_dict().items()}

    assert {key: shapes.get(key) for key in SHAPES[name]} == SHAPES[name]


def test_resampling_blocks_leave_no_strided_convolution() -> None:
    assert [key for key in build("ldm_churches").state_dict() if ".op." in key or ".conv." in key] == []


@pytest.mark.parametrize("name", [*MILLIONS, "unet_tiny"])
def test_network_config_says_its_package(name: str) -> None:
    assert (CONF / f"{name}.yaml").read_text().startswith("# @package network\n")


def test_the_tiny_network_has_about_a_million_parameters() -> None:
    assert millions(build("unet_tiny")) == "1.00"
