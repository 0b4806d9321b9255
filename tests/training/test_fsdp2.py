"""Two processes that hold half of every parameter each, against one process, with the same global batch."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ddp_worker import MODULES
from fsdp2_worker import edm2_module, train_edm2
from tiny_models import autoencoder_module, quiet_trainer, write_colours
from torch.testing import assert_close

from ldm.data import ShardDataModule
from ldm.nn.weights import read_weights
from ldm.training.checkpoint_files import read_manifest
from ldm.training.checkpoint_folders import find, newest_valid
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.fit import leave_group
from ldm.training.sharding import check_steps_spread
from ldm.training.strategies import fsdp2

HERE = Path(__file__).resolve().parent


def train_alone(folder: Path, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
    module = MODULES["latent_diffusion"]()
    data = ShardDataModule(folder / "colours", folder / "colours", batch_size=6, resolution=16, seed=3)
    trainer = quiet_trainer(max_steps=4, gradient_clip_val=0.5, plugins=[AtomicCheckpointIO()])
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp2")
    write_colours(folder / "colours")
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "fsdp2_worker.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_two_processes_end_where_one_does_and_go_on_as_if_never_stopped(kind: str, folder: Path) -> None:
    results: dict[str, dict[str, Any]] = torch.load(folder / f"{kind}.pt", weights_only=True)
    straight, resumed = results["straight"], results["resumed"]
    assert_close(resumed, straight, rtol=0, atol=0)
    assert 0.4 < straight["share"] < 0.6, "each process holds about half"
    alone = train_alone(folder)
    assert set(alone) <= set(straight)
    assert_close({name: straight[name] for name in alone}, alone, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_weights_of_magnitude_1_stay_so_where_they_are_spread(folder: Path) -> None:
    spread: dict[str, torch.Tensor] = torch.load(folder / "edm2.pt", weights_only=True)
    alone = train_edm2(folder)
    assert set(alone) <= set(spread)
    assert_close({name: spread[name] for name in alone}, alone, rtol=1e-4, atol=2e-5)
    before = edm2_module().state_dict()
    assert sum(not torch.allclose(alone[name], before[name], atol=1e-3) for name in alone) > 10


@pytest.mark.slow
def test_a_gathered_checkpoint_goes_on_in_one_process(folder: Path) -> None:
    gone_on = train_alone(folder, folder / "full" / "step=000000002.ckpt")
    assert_close(gone_on, train_alone(folder), rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_shards_stand_under_one_manifest(folder: Path) -> None:
    newest, middle = find(folder / "sharded")
    manifest = read_manifest(middle)
    assert (manifest.facts["step"], manifest.facts["world_size"]) == (2, 2)
    assert sorted(manifest.files) == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]
    assert newest_valid(folder / "sharded") == newest
    with (newest / "__1_0.distcp").open("r+b") as file:
        file.write(b"x")
    assert newest_valid(folder / "sharded") == middle


@pytest.mark.slow
def test_the_finished_weights_are_whole(folder: Path) -> None:
    weights = read_weights(folder / "weights.safetensors")[0]
    results = torch.load(folder / "sharded.pt", weights_only=True)
    average = {name: results["straight"][f"ema.module.{name}"] for name in weights}
    assert_close(weights, average, rtol=1e-4, atol=2e-5)


def test_a_module_that_does_not_spread_its_parts_is_refused_in_one_line(tmp_path: Path) -> None:
    write_colours(tmp_path / "colours")
    data = ShardDataModule(tmp_path / "colours", batch_size=6, resolution=16)
    try:
        with pytest.raises(ValueError, match="expected a module that spreads its parts"):
            quiet_trainer(max_steps=1, strategy=fsdp2()).fit(autoencoder_module(), data)
    finally:
        leave_group()  # of one process, which is there by then


def test_an_optimizer_that_cannot_step_spread_parameters_is_refused() -> None:
    spread = SimpleNamespace(to_local=lambda: None)
    eight_bit = type("AdamW8bit", (), {"__module__": "bitsandbytes.optim.adamw"})()
    eight_bit.param_groups = [{"params": [torch.nn.Parameter(torch.zeros(2)), spread]}]
    with pytest.raises(ValueError, match="got optimizer AdamW8bit with parameters that FSDP2 spreads"):
        check_steps_spread(eight_bit)
    eight_bit.param_groups = [{"params": [torch.nn.Parameter(torch.zeros(2))]}]
    check_steps_spread(eight_bit)


def test_another_kind_of_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'full' or 'sharded'"):
        fsdp2(state_dict_type="half")  # type: ignore[arg-type]
