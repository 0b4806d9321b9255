"""What of a checkpoint goes where, and that it comes back the same without running code."""

import json
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ldm.training.checkpoint_files import Damaged, write
from ldm.training.checkpoint_parts import (
    AVERAGE,
    CONFIG,
    STATE,
    WEIGHTS,
    facts_of,
    map_tensors,
    num_bytes,
    parts_of,
    read,
    read_model,
    snapshot,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64]


def checkpoint() -> dict[str, Any]:
    weights = {f"layer.{str(dtype).removeprefix('torch.')}": torch.ones(3).to(dtype) for dtype in DTYPES}
    shapes = {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "transposed": torch.randn(3, 5).T}
    return {
        "global_step": 7,
        "epoch": 1,
        "state_dict": {"ema.module.w": torch.randn(4), **weights, **shapes, "extra": {"kind": "plain"}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(4)}}}],
        "config": {"name": "x", "list": [1, 2.5, None]},
        "ShardDataModule": {"position": 12, "fingerprint": "abc"},
    }


def save(path: Path, content: dict[str, Any]) -> Path:
    write(path, parts_of(content), facts=facts_of(content))
    return path


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found.cpu().to(torch.complex128), expected.cpu().to(torch.complex128))
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    else:
        assert found == expected


def test_everything_comes_back_the_same_and_in_order(tmp_path: Path) -> None:
    content = checkpoint()
    found = read(save(tmp_path / "a.ckpt", content))
    assert_same({key: found[key] for key in content}, content)


def test_weights_and_average_are_files_that_safetensors_reads(tmp_path: Path) -> None:
    content = checkpoint()
    path = save(tmp_path / "a.ckpt", content)
    assert sorted(entry.name for entry in path.iterdir()) == [CONFIG, AVERAGE, "manifest.json", STATE, WEIGHTS]
    weights = safetensors.torch.load_file(path / WEIGHTS)
    average = safetensors.torch.load_file(path / AVERAGE)
    assert_same(average, {"ema.module.w": content["state_dict"]["ema.module.w"]})
    assert weights.keys() | average.keys() == content["state_dict"].keys() - {"layer.complex64", "extra"}
    for name, value in weights.items():
        assert_same(value, content["state_dict"][name])
    assert json.loads((path / CONFIG).read_text()) == content["config"]


def test_the_rest_loads_without_unpickling_code(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", checkpoint())
    assert torch.load(path / STATE, weights_only=True)["global_step"] == 7


def test_a_config_that_json_would_change_stays_in_the_state(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", {"config": {1: "a number as key"}})
    assert not (path / CONFIG).exists()
    assert read(path)["config"] == {1: "a number as key"}


class Custom(dict):
    """A dict that only running code could load."""


@pytest.mark.parametrize("value", [Path("x"), Custom(a=1), pytest], ids=["path", "subclass", "module"])
def test_what_only_code_could_load_is_refused_when_it_is_saved(value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"plain Python values, which load without running code|pickle"):
        parts_of({"callbacks": {"mine": {"state": value}}})


def test_the_model_is_read_without_the_optimizers(tmp_path: Path) -> None:
    content = checkpoint()
    del content["state_dict"]["extra"], content["state_dict"]["layer.complex64"]
    path = save(tmp_path / "a.ckpt", content)
    config, state = read_model(path)
    assert config == content["config"]
    assert_same({name: state[name] for name in content["state_dict"]}, content["state_dict"])


def test_a_damaged_checkpoint_and_one_without_config_make_no_model(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", {"state_dict": {"w": torch.zeros(2)}})
    with pytest.raises(ValueError, match="without a config"):
        read_model(path)
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-1] + b"\1")
    with pytest.raises(Damaged, match=r"a.ckpt, a damaged checkpoint \(weights.safetensors is not as it was written\)"):
        read_model(path)


def test_the_former_single_file_reads_as_before(tmp_path: Path) -> None:
    content = checkpoint()
    torch.save(content, tmp_path / "a.ckpt")
    assert_same(read(tmp_path / "a.ckpt"), content)
    assert_same(read_model(tmp_path / "a.ckpt")[1], content["state_dict"])


def test_the_manifest_says_what_the_checkpoint_is_of() -> None:
    facts = facts_of(checkpoint())
    assert {name: facts[name] for name in ("step", "epoch", "world_size", "data")} == {
        "step": 7,
        "epoch": 1,
        "world_size": 1,
        "data": "abc",
    }
    assert facts["config_sha256"] != facts_of({"config": {"name": "y"}})["config_sha256"]


def test_a_snapshot_does_not_follow_training() -> None:
    weight = torch.zeros(3)
    state = {
        "list": [weight],
        "pair": (weight, 1),
        "ordered": OrderedDict(w=weight),
        "default": defaultdict(int, w=weight),
    }
    taken = snapshot(state)
    weight.add_(1)
    kept = [taken["list"][0], taken["pair"][0], taken["ordered"]["w"], taken["default"]["w"]]
    assert [value.sum().item() for value in kept] == [0, 0, 0, 0]
    assert [type(value) for value in taken.values()] == [list, tuple, OrderedDict, defaultdict]
    assert state["list"][0].sum() == 3


def test_sizes_are_of_all_tensors_however_deep() -> None:
    assert num_bytes({"a": [torch.zeros(2), ({"b": torch.zeros(3, dtype=torch.float64)},)], "c": "text"}) == 8 + 24
    assert map_tensors({"a": [1, "x"]}, lambda tensor: None) == {"a": [1, "x"]}
