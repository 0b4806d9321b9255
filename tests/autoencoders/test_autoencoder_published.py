"""The autoencoders under conf/autoencoder against the sizes, tensors and names of the published ones."""

import importlib
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

CONF = Path(__file__).parents[2] / "conf" / "autoencoder"

# Millions of parameters, encoder and decoder together and the codebook by itself, to the published digit.
MILLIONS = {
    "kl_f4": "55.3",
    "kl_f8": "83.65",
    "kl_f16": "69.6",
    "kl_f32": "103.9",
    "sd": "83.65",
    "sdxl": "83.65",
    "sd3": "83.82",
    "vq_f4": "55.3",
    "vq_f4_noattn": "53.2",
    "vq_f8": "67.7",
    "vq_f8_n256": "67.7",
    "vq_f16": "69.5",
}
SCALES = {"kl_f8": 1.0, "sd": 0.18215, "sdxl": 0.13025, "sd3": 1.5305, "x4_upscaler": 0.08333, "vq_f4": 1.0}
CODES = {"vq_f4": 8192, "vq_f4_noattn": 8192, "vq_f8": 16384, "vq_f8_n256": 256, "vq_f16": 16384}
# (downsampling factor, latent channels)
GEOMETRIES = {
    "kl_f4": (4, 3),
    "kl_f8": (8, 4),
    "kl_f16": (16, 16),
    "kl_f32": (32, 64),
    "sd": (8, 4),
    "sdxl": (8, 4),
    "sd3": (8, 16),
    "x4_upscaler": (4, 4),
    "identity": (1, 3),
    "vq_f4": (4, 3),
    "vq_f4_noattn": (4, 3),
    "vq_f8": (8, 4),
    "vq_f8_n256": (8, 4),
    "vq_f16": (16, 8),
}


def build(name: str, device: str = "meta") -> nn.Module:
    """Build the autoencoder of conf/autoencoder/NAME.yaml."""
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    module, _, attribute = config.pop("_target_").rpartition(".")
    with torch.device(device):
        return getattr(importlib.import_module(module), attribute)(**config)


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_count_is_the_published_one(name: str) -> None:
    digits = len(MILLIONS[name].partition(".")[2])
    autoencoder = build(name)
    codebook = autoencoder.quantize.embedding.weight.numel() if name in CODES else 0
    millions = (sum(parameter.numel() for parameter in autoencoder.parameters()) - codebook) / 1e6

    assert f"{millions:.{digits}f}" == MILLIONS[name]


def test_stable_diffusion_has_248_tensors_of_weights() -> None:
    assert len(list(build("sd").parameters())) == 248


def test_tensors_have_their_published_names_and_shapes() -> None:
    published = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.3.block.1.conv2.weight": (512, 512, 3, 3),
        "encoder.mid.block_1.norm1.weight": (512,),
        "encoder.mid.attn_1.norm.weight": (512,),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "encoder.norm_out.weight": (512,),
        "encoder.conv_out.weight": (8, 512, 3, 3),
        "decoder.conv_in.weight": (512, 4, 3, 3),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.up.0.block.2.conv2.weight": (128, 128, 3, 3),
        "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.conv_out.weight": (3, 128, 3, 3),
        "quant_conv.weight": (8, 8, 1, 1),
        "post_quant_conv.weight": (4, 4, 1, 1),
    }
    shapes = {name: tuple(value.shape) for name, value in build("sd").state_dict().items()}

    assert {name: shapes.get(name) for name in published} == published


@pytest.mark.parametrize("name", CODES)
def test_codebook_and_the_convolutions_around_it_have_their_published_names_and_shapes(name: str) -> None:
    _, channels = GEOMETRIES[name]
    published = {
        "quantize.embedding.weight": (CODES[name], channels),
        "encoder.conv_out.weight": (channels, 512, 3, 3),
        "quant_conv.weight": (channels, channels, 1, 1),
        "post_quant_conv.weight": (channels, channels, 1, 1),
        "decoder.conv_in.weight": (512, channels, 3, 3),
    }
    shapes = {name: tuple(value.shape) for name, value in build(name).state_dict().items()}

    assert {name: shapes.get(name) for name in published} == published


def test_attention_stands_where_its_pixel_sizes_are() -> None:
    names = build("kl_f16").state_dict()

    assert {name.rpartition(".attn.")[0] for name in names if ".attn." in name} == {"encoder.down.4", "decoder.up.4"}


@pytest.mark.parametrize("name", SCALES)
def test_latent_scale_is_the_published_one(name: str) -> None:
    torch.testing.assert_close(build(name, device="cpu").latent_scale, torch.tensor(SCALES[name]))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_autoencoder_config_says_its_package_and_geometry(name: str) -> None:
    autoencoder = build(name)

    assert (CONF / f"{name}.yaml").read_text().startswith("# @package autoencoder\n")
    assert (autoencoder.downsampling_factor, autoencoder.latent_channels) == GEOMETRIES[name]
