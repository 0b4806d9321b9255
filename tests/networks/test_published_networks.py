"""The networks of conf/network beside the U-Nets of latent diffusion: parameters and multiply-adds as published."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from network_helpers import num_parameters
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.diffusion.conditioning import Conditioning

CONF = Path(__file__).parents[2] / "conf" / "network"

# Millions of parameters to the published digit. EDM, EDM2, MicroDiT and ADM as counted from the released networks.
MILLIONS = {
    "edm_ddpmpp_cifar10": "55.74",
    "edm_ncsnpp_cifar10": "56.40",
    "edm_ddpmpp_ffhq": "61.81",
    "edm_adm_imagenet64": "295.90",
    "edm2_xs": "124.71",
    "edm2_s": "280.21",
    "edm2_m": "497.81",
    "edm2_l": "777.50",
    "edm2_xl": "1119.28",
    "edm2_xxl": "1523.16",
    "mmdit_sd3_medium": "2028.33",
    "mmdit_sd35_large": "8056.63",
    "mmdit_sd35_medium": "2243.17",
    "micro_dit_xl_2": "1165.44",
    "adm_64": "295.90",
    "adm_128": "421.53",
    "adm_256": "553.84",
    "adm_512": "559.00",
    "adm_lsun": "552.81",
    "adm_64_to_256": "311.80",
    "adm_128_to_512": "308.84",
}
# The published counts of DiT hold the fixed table of 16x16 positions (at patch 2) of 256x256 images; we compute it.
MILLIONS_WITH_POSITIONS = {
    "dit_s_2": "32.96",
    "dit_b_2": "130.51",
    "dit_l_2": "458.10",
    "dit_xl_2": "675.13",
    "dit_s_4": "32.95",
    "dit_b_4": "130.48",
    "dit_l_4": "458.05",
    "dit_xl_4": "675.07",
    "dit_s_8": "33.15",
    "dit_b_8": "130.88",
    "dit_l_8": "458.59",
    "dit_xl_8": "675.68",
}
# One multiply-add is one, element-wise work is nothing: the convention of Peebles and Xie 2023, table 4 and section 5.
# Name, pixels a side of what the network sees, published 10^9 multiply-adds.
MULTIPLY_ADDS = [
    ("dit_s_8", 32, 0.36),
    ("dit_s_4", 32, 1.41),
    ("dit_s_2", 32, 6.06),
    ("dit_b_8", 32, 1.42),
    ("dit_b_4", 32, 5.56),
    ("dit_b_2", 32, 23.01),
    ("dit_l_8", 32, 5.01),
    ("dit_l_4", 32, 19.70),
    ("dit_l_2", 32, 80.71),
    ("dit_xl_8", 32, 7.39),
    ("dit_xl_4", 32, 29.05),
    ("dit_xl_2", 32, 118.64),
    ("dit_xl_2", 64, 524.60),
    ("adm_256", 256, 1120.0),
    ("adm_512", 512, 1983.0),
]
# Karras et al. 2024, table 2.
EDM2_GFLOPS = {"edm2_xs": 46, "edm2_s": 102, "edm2_m": 181, "edm2_l": 282, "edm2_xl": 406, "edm2_xxl": 552}


def config(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())


def build(name: str, **changes: object) -> nn.Module:
    """Build the network of conf/network/NAME.yaml on the meta device."""
    settings = config(name)
    module, _, attribute = settings.pop("_target_").rpartition(".")
    with torch.device("meta"):
        return getattr(importlib.import_module(module), attribute)(**{**settings, **changes})


def millions(count: int) -> str:
    return f"{count / 1e6:.2f}"


def giga_multiply_adds(network: nn.Module, size: int) -> float:
    """10^9 multiply-adds of one forward pass for one image or latent of size x size."""
    arguments = network.arguments
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        vector = torch.zeros(1, dtype=torch.int64) if arguments["num_classes"] else None
        network(torch.zeros(1, arguments["in_channels"], size, size), torch.zeros(1), Conditioning(vector=vector))
    return counter.get_total_flops() / 2 / 1e9


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_count_is_the_published_one(name: str) -> None:
    assert millions(num_parameters(build(name))) == MILLIONS[name]


@pytest.mark.parametrize("name", MILLIONS_WITH_POSITIONS)
def test_parameter_count_with_the_table_of_positions_is_the_published_one(name: str) -> None:
    network = build(name)
    positions = (32 // network.patch_size) ** 2 * network.width
    text = (CONF / f"{name}.yaml").read_text()

    assert millions(num_parameters(network) + positions) == MILLIONS_WITH_POSITIONS[name]
    for said in (millions(num_parameters(network)), MILLIONS_WITH_POSITIONS[name], f"{positions:,}"):
        assert said in text


# Published networks that differ from one under conf/network by a setting.
VARIANTS = [
    ("edm_ddpmpp_cifar10", {"num_classes": None}, "55.73"),
    ("edm_ncsnpp_cifar10", {"num_classes": None}, "56.40"),
    ("edm2_s", {"in_channels": 3, "out_channels": 3}, "280.21"),
    ("adm_256", {"num_classes": None}, "552.81"),
    ("adm_512", {"num_classes": None}, "557.97"),
]


@pytest.mark.parametrize(("name", "changes", "size"), VARIANTS)
def test_parameter_count_of_a_variant_is_the_published_one(name: str, changes: dict[str, Any], size: str) -> None:
    assert millions(num_parameters(build(name, **changes))) == size


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
def test_sit_is_the_network_of_dit(size: str) -> None:
    assert config(f"sit_{size}_2") == config(f"dit_{size}_2")


@pytest.mark.parametrize(("name", "size", "published"), MULTIPLY_ADDS)
def test_multiply_adds_are_the_published_ones(name: str, size: int, published: float) -> None:
    assert giga_multiply_adds(build(name), size) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("upsampler", "base", "sizes", "published"),
    [("adm_64_to_256", "adm_64", (256, 64), 742.0), ("adm_128_to_512", "adm_128", (512, 128), 2813.0)],
)
def test_an_upsampler_and_its_base_together_have_the_published_multiply_adds(
    upsampler: str, base: str, sizes: tuple[int, int], published: float
) -> None:
    together = giga_multiply_adds(build(upsampler), sizes[0]) + giga_multiply_adds(build(base), sizes[1])
    assert together == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("name", EDM2_GFLOPS)
def test_published_flops_of_edm2_are_multiply_adds_and_element_wise_work(name: str) -> None:
    network = build(name)
    # Their count has element-wise operations at one each: three for every weight normalised, and those on activations.
    normalisation = 3 * num_parameters(network) / 1e9

    on_activations = EDM2_GFLOPS[name] - giga_multiply_adds(network, 64) - normalisation

    assert 0 < on_activations < 1
