"""Each check of several processes holds where all is well, and is proven to fail where it is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.training.honesty import bits, listed, repeated, state

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each of two ranks was told, by scenario."""
    from tiny_models import write_colours

    folder = tmp_path_factory.mktemp("honesty")
    write_colours(folder / "colours")
    paths = os.pathsep.join([os.fspath(HERE.parents[1]), os.fspath(HERE)])
    finished = subprocess.run(
        [sys.executable, os.fspath(HERE / "honesty_worker.py"), os.fspath(folder)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_every_breach_is_found_and_told_on_all_ranks_alike(told: list[dict[str, str]]) -> None:
    first, second = told
    assert first == second
    assert first.pop("nothing") == ""
    expected = {
        "weights": "weights differ between the ranks before the first step: trained.denoiser",
        "average": "weights differ between the ranks before the first step: ema.module",
        "scale": "weights differ between the ranks before the first step: autoencoder.latent_scale;",
        "scale_later": "weights differ between the ranks after step 2: ",
        "gradients": "gradients differ between the ranks at step 0: trained.denoiser",
        "samples": "samples were read twice, those at the places 0, 1, 2 of the stream",
    }
    assert {name: line[: len(expected[name])] for name, line in first.items()} == expected
    assert "autoencoder.latent_scale" in first["scale_later"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_a_hash_sees_one_changed_number_and_two_that_change_places(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    for other in (tensor.flip(1).contiguous(), tensor.clone().index_fill(1, torch.tensor([1]), 0)):
        assert (bits(other) == bits(tensor)) == torch.equal(other, tensor)
    assert bits(tensor.clone()) == bits(tensor)


def test_long_tensors_are_hashed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = bits(tensor)
    monkeypatch.setattr("ldm.training.honesty._CHUNK", 64)
    assert bits(tensor) == whole


def test_a_batch_norms_running_statistics_are_each_ranks_own() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.SyncBatchNorm(2))
    assert {name for name in state(module) if "running" in name} == {"1.running_mean", "1.running_var"}


def test_what_occurs_twice_is_named_and_long_lists_are_cut() -> None:
    assert repeated([3, 1, 3, 2, 1]) == [3, 1]
    assert listed(list(range(7))) == "0, 1, 2, 3, 4 and 2 more"
