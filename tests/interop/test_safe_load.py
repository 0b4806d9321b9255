"""Weight files of every kind are read; bad ones are refused in one line each, and none of them runs anything."""

import collections
import json
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm.interop.safe_load import find_weights, read_file

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, argument: str) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, (self.argument,)


def assert_same(state: dict[str, torch.Tensor]) -> None:
    assert state.keys() == STATE.keys()
    for name, tensor in STATE.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_file(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_safetensors_give_tensors_and_metadata(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors", metadata={"modelspec.prediction_type": "v"})
    found = read_file(tmp_path / "model.safetensors")
    assert_same(found.state)
    assert found.metadata == {"modelspec.prediction_type": "v"}


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_tensors_give_the_same(tmp_path: Path, zipped: bool) -> None:
    torch.save({"state_dict": STATE, "global_step": 7}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    assert_same(read_file(tmp_path / "a.ckpt").state)


def test_the_kind_is_told_by_the_content_and_not_by_the_name(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.ckpt")
    assert_same(read_file(tmp_path / "model.ckpt").state)


@pytest.mark.parametrize(("length", "beginning"), [(0x80, b"\x80"), (0x4B50, b"PK")])
def test_safetensors_may_begin_with_the_bytes_of_another_kind(tmp_path: Path, length: int, beginning: bytes) -> None:
    path, header = tmp_path / "a.safetensors", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    values = np.array([1.5, -2.0], dtype="<f4")
    path.write_bytes(length.to_bytes(8, "little") + json.dumps(header).encode().ljust(length) + values.tobytes())
    assert path.read_bytes().startswith(beginning)
    assert read_file(path).state["a"].tolist() == [1.5, -2.0]


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    save_file({"a.weight": STATE["a.weight"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": STATE["b"]}, tmp_path / "model-00002-of-00002.safetensors")
    places = {"a.weight": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same(read_file(find_weights(tmp_path, "model")).state)
    save_file({"c": STATE["b"]}, tmp_path / "model-00002-of-00002.safetensors")
    assert "lack b" in refused(tmp_path / "model.safetensors.index.json")


def test_full_precision_safetensors_come_before_half_and_pickles(tmp_path: Path) -> None:
    for name in ("model.fp16.safetensors", "model.safetensors", "model.bin"):
        (tmp_path / name).touch()
    assert find_weights(tmp_path, "model").name == "model.safetensors"
    (tmp_path / "model.safetensors").unlink()
    assert find_weights(tmp_path, "model").name == "model.fp16.safetensors"


def lightning_checkpoint(path: Path) -> None:
    """What Lightning left in checkpoints: a class as a key, NumPy scalars, omegaconf's and its own containers."""
    modules = {}
    for place, name in [
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
        ("omegaconf.listconfig", "ListConfig"),
    ]:
        modules[place] = types.ModuleType(place)
        setattr(modules[place], name, type(name, (), {"__module__": place}))
    genuine = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        checkpoint = {
            "state_dict": STATE,
            "callbacks": {modules["pytorch_lightning.callbacks.model_checkpoint"].ModelCheckpoint: {"best": 1.5}},
            "hyper_parameters": collections.defaultdict(dict, list=modules["omegaconf.listconfig"].ListConfig()),
            "best_model_score": np.float64(0.25),
        }
        torch.save(checkpoint, path)
    finally:
        for name, module in genuine.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})


def test_a_checkpoint_of_lightning_with_callbacks_is_read_without_their_classes(tmp_path: Path) -> None:
    lightning_checkpoint(tmp_path / "sd.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "sd.ckpt", weights_only=True)
    assert_same(read_file(tmp_path / "sd.ckpt").state)


@pytest.mark.parametrize("function", [os.mkdir, eval])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_by_name_and_not_run(tmp_path: Path, function: Any, zipped: bool) -> None:
    path, mark = tmp_path / "evil.ckpt", tmp_path / "mark"
    argument = str(mark) if function is os.mkdir else f"open({str(mark)!r}, 'w')"
    content = {"state_dict": STATE, "extra": Calls(function, argument)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refused(path)
    assert function.__name__ in message
    assert ".safetensors" in message
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_a_stand_in_leaves_nothing_allowed_behind(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    lightning_checkpoint(tmp_path / "sd.ckpt")
    read_file(tmp_path / "sd.ckpt")
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_pickle_is_named(tmp_path: Path, zipped: bool) -> None:
    torch.save({"w": torch.zeros(4000)}, tmp_path / "whole.ckpt", _use_new_zipfile_serialization=zipped)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes((tmp_path / "whole.ckpt").read_bytes()[:3000])
    assert "cut short" in refused(cut)


def test_truncated_safetensors_are_named(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4000)}, tmp_path / "whole.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:3000])
    assert "cut short" in refused(cut)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html><body>Log in</body></html>", "web page"),
        (b"\n<html>", "web page"),
        (b"Access to model is restricted", "neither safetensors nor"),
    ],
)
def test_what_is_no_weights_file_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert said in refused(path)


def test_a_pickle_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.ckpt")
    assert "without named tensors" in refused(tmp_path / "a.ckpt")


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        read_file(tmp_path / "absent.ckpt")
