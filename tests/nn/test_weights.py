from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from ldm.nn.weights import read_weights, save_weights

CONFIG: dict[str, Any] = {"width": 3, "mult": [1, 2], "name": "naïve", "ratio": 0.1, "nothing": None}


def make() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    module.half_precision = nn.Parameter(torch.randn(2, 2).bfloat16())
    return module


def write(path: Path) -> Path:
    save_weights(path, make().state_dict(), target="some.Module", config=CONFIG)
    return path


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    state, target, config = read_weights(write(tmp_path / "deep" / "folder" / "weights.safetensors"))
    assert_close(state, dict(make().state_dict()), rtol=0, atol=0)
    assert (target, config) == ("some.Module", CONFIG)


def test_slices_and_transposes_are_written_by_value(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    views = {"transposed": base.T, "part": base[1:3, ::2]}
    save_weights(tmp_path / "w.safetensors", views, target="t", config={})
    assert_close(read_weights(tmp_path / "w.safetensors")[0], {name: view.clone() for name, view in views.items()})


def test_writing_leaves_only_the_file_and_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"older")
    write(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]
    assert read_weights(path)[1] == "some.Module"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^got no weights at .*none\.safetensors, expected"):
        read_weights(tmp_path / "none.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 40, 300, -1], ids=["empty", "length", "header", "data", "last_byte"])
def test_a_truncated_file_is_called_damaged(tmp_path: Path, kept: int) -> None:
    path = write(tmp_path / "w.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"^got .*w\.safetensors, which is damaged .*; write it again"):
        read_weights(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["none", "foreign"])
def test_a_foreign_file_is_told_from_ours(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "w.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="without a description of its module, expected a file written by ldm"):
        read_weights(tmp_path / "w.safetensors")
