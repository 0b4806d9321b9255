"""Checkpoints in shards stand under the same manifest as all others."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import latent_diffusion_module, quiet_trainer

from ldm.training.checkpoint_files import is_valid, read_manifest
from ldm.training.checkpoint_folders import find, newest_valid
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.checkpoints import Checkpoints
from ldm.training.strategies import fsdp

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
def test_two_processes_write_their_shards_under_one_manifest_and_go_on_from_them(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "sharded_worker.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        weights = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for name, value in weights["straight"].items():
            assert torch.equal(weights["resumed"][name], value), name
    newest, middle = find(tmp_path / "checkpoints")
    assert [newest.name, middle.name] == ["step=000000005.ckpt", "step=000000004.ckpt"]
    assert is_valid(newest), "the step saved again replaces the one before"
    manifest = read_manifest(middle)
    assert (manifest.facts["step"], manifest.facts["world_size"]) == (4, 2)
    assert sorted(manifest.files) == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]
    with (newest / "__1_0.distcp").open("r+b") as file:
        file.write(b"x")
    assert newest_valid(tmp_path / "checkpoints") == middle


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FSDP runs on GPUs alone")
@pytest.mark.parametrize("state_dict_type", ["full", "sharded"])
def test_fsdp_goes_on_from_its_own_checkpoint(state_dict_type: str, tmp_path: Path, make_data: partial) -> None:
    def fit(folder: Path, max_steps: int, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
        module = latent_diffusion_module()
        trainer = quiet_trainer(
            max_steps=max_steps,
            accelerator="gpu",
            devices=1,
            strategy=fsdp(state_dict_type=state_dict_type),
            plugins=[AtomicCheckpointIO()],
            callbacks=[Checkpoints(folder, every_n_steps=2)],
        )
        trainer.fit(module, make_data(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return {name: value.detach().cpu().clone() for name, value in module.trained.state_dict().items()}

    straight = fit(tmp_path / "straight", 4)
    resumed = fit(tmp_path / "resumed", 4, tmp_path / "straight" / "step=000000002.ckpt")
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value)
    assert all(is_valid(place) for place in find(tmp_path / "straight"))
