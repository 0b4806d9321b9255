"""CompVis -> ours -> diffusers -> ours -> CompVis leaves every tensor of every published family bit-equal."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pretrained import TINY, tiny_state

from ldm.interop import FAMILIES, open_model, write_compvis, write_diffusers, write_ldm
from ldm.interop.compvis import NETWORK
from ldm.interop.conditioning import text_kind, text_parts
from ldm.interop.families import recognise
from ldm.interop.unet import unet_geometry

# Only of these does neither the file nor the family tell it.
TOLD = {"sd2": "v"}
# Eight heads on levels of different width without a context: diffusers has heads of one width there.
NOT_IN_DIFFUSERS = ("ldm_churches", "ldm_inpainting")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_every_family_is_among_the_tiny_ones() -> None:
    assert TINY.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", TINY)
def test_a_family_is_recognised_with_its_heads_by_structure(name: str) -> None:
    state = tiny_state(name)
    network = {key.removeprefix(NETWORK): tensor for key, tensor in state.items() if key.startswith(NETWORK)}
    geometry = unet_geometry(network)
    family = recognise(geometry, text_kind(text_parts(state), has_vector=geometry["vector_dim"] is not None))
    assert family is FAMILIES[name]
    built = {**geometry, "num_heads": None, "num_head_channels": None, **family.heads}
    assert {key: built[key] for key in TINY[name].network} == TINY[name].network


@pytest.mark.parametrize("name", sorted(TINY.keys() - NOT_IN_DIFFUSERS))
def test_the_round_trip_through_diffusers_is_exact(tmp_path: Path, name: str) -> None:
    state = tiny_state(name)
    save_file(state, tmp_path / "model.safetensors")
    model = open_model(tmp_path / "model.safetensors", prediction=TOLD.get(name))
    write_diffusers(model, tmp_path / "folder")
    again = open_model(tmp_path / "folder")
    write_compvis(again, tmp_path / "back.safetensors")
    assert_equal(load_file(tmp_path / "back.safetensors"), state)
    assert again.family == model.family


@pytest.mark.parametrize("name", NOT_IN_DIFFUSERS)
def test_a_family_that_diffusers_cannot_hold_is_refused_and_goes_round_by_our_own_file(
    tmp_path: Path, name: str
) -> None:
    state = tiny_state(name)
    save_file(state, tmp_path / "model.safetensors")
    model = open_model(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="heads of one width"):
        write_diffusers(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    write_ldm(model, tmp_path / "own.safetensors")
    again = open_model(tmp_path / "own.safetensors")
    write_compvis(again, tmp_path / "back.safetensors")
    assert_equal(load_file(tmp_path / "back.safetensors"), state)
    assert again.family == model.family
