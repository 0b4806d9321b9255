"""Every published U-Net is told apart by its arguments alone, and gets the heads that it was trained with."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from ldm.interop.families import FAMILIES, as_prediction, recognise
from ldm.networks import UNet

CONF = Path(__file__).resolve().parents[2] / "conf" / "network"
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(UNet.__init__).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}
FILES = {
    "sd1": "sd1",
    "sd2": "sd2",
    "sd_inpainting": "sd2_inpainting",
    "sd_depth": "sd2_depth",
    "sd_x4": "x4_upscaler",
    "sdxl_base": "sdxl",
    "sdxl_refiner": "sdxl_refiner",
    "ldm_txt2img": "ldm_text_to_image",
    "ldm_text2img256": "ldm_text_to_image_cc",
    "ldm_layout": "ldm_layout",
    "ldm_cin256_v2": "ldm_class",
    "ldm_celebahq": "ldm_unconditional",
    "ldm_churches": "ldm_churches",
    "ldm_bsr_sr": "ldm_super_resolution",
    "ldm_inpainting_big": "ldm_inpainting",
}


def geometry(file: str) -> dict[str, Any]:
    given = yaml.safe_load((CONF / f"{file}.yaml").read_text())
    return {**DEFAULTS, **given}


@pytest.mark.parametrize(("file", "name"), FILES.items())
def test_a_published_network_is_recognised_with_its_heads(file: str, name: str) -> None:
    arguments = geometry(file)
    for text in (None, FAMILIES[name].text):
        found = recognise(arguments, text)
        assert found is not None
        assert found.name == name
    heads = {key: arguments[key] for key in ("num_heads", "num_head_channels") if arguments[key] is not None}
    assert FAMILIES[name].heads == heads


@pytest.mark.parametrize("file", ["ldm_cin_f8", "ldm_semantic"])
@pytest.mark.parametrize("text", [None, "class", "unknown"])
def test_a_network_that_shares_most_of_a_familys_structure_is_not_taken_for_it(file: str, text: str | None) -> None:
    assert recognise(geometry(file), text) is None


def test_every_family_is_published_as_one_of_these_files_or_is_sd1_inpainting() -> None:
    assert FAMILIES.keys() == {*FILES.values(), "sd1_inpainting"}


def test_a_family_is_told_its_prediction_and_has_the_size_that_goes_with_it() -> None:
    assert FAMILIES["sd2"].prediction is None
    assert FAMILIES["sd2"].with_prediction("v").image_size == 768
    assert FAMILIES["sd2"].with_prediction("epsilon").image_size == 512


@pytest.mark.parametrize("word", ["velocity", "", "flow"])
def test_a_prediction_of_another_name_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match="expected one of epsilon, v, x_0"):
        as_prediction(word, source="somewhere")
