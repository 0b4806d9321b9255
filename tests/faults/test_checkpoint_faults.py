"""Whatever happens while a checkpoint is saved, a reader finds the old one or the new one, whole."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_trials import state, step_of
from omegaconf import OmegaConf

from ldm.cli.run_folder import RunFolder
from ldm.training.checkpoint_io import AtomicCheckpointIO

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `checkpoint_trials` found."""
    command = [sys.executable, str(HERE / "checkpoint_trials.py"), str(tmp_path_factory.mktemp("trials"))]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("action", ["write_over", "save_and_remove", "seal_and_replace"])
def test_kill_9_anywhere_in_a_save_leaves_the_old_or_the_new_one(action: str, trials: dict[str, Any]) -> None:
    found = trials[action]
    assert found["lines"] > 2 * len(found["step"])
    assert all(found["killed"])
    assert set(found["step"]) == {2, 3}
    assert found["step"] == sorted(found["step"]), "once there, the new one stays"
    assert min(found["valid"]) >= 2
    assert max(found["damaged"]) == 0
    assert max(found["swept"]) > 0
    assert not any(found["litter"])


@pytest.mark.slow
def test_kill_9_at_any_time_destroys_nothing_with_the_temporary_folder_on_another_disk(trials: dict[str, Any]) -> None:
    found = trials["any_time"]
    assert found["destroyed"] == 0
    assert found["steps"] == sorted(found["steps"])
    assert found["steps"][-1] > 5, "some children must have come far enough to save"
    assert found["litter"] == []
    assert found["files"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("io", ["AtomicCheckpointIO", "BackgroundCheckpointIO"])
def test_a_disk_that_fills_up_stops_the_run_within_a_step_and_costs_no_checkpoint(
    io: str, trials: dict[str, Any]
) -> None:
    found = trials[io]
    assert found["status"] == 0
    assert "step=000000015.ckpt: could not be saved" in found["said"]
    assert "File too large; it needs" in found["said"]
    assert "\n" not in found["said"]
    assert found["steps"] <= 16
    assert found["names"] == ["step=000000005.ckpt", "step=000000010.ckpt"]
    assert found["valid"] == 2


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with checkpoints of steps 1 and 2."""
    config = {"name": "toy", "run_id": "x", "run_dir": None, "resume": "auto", "paths": {"runs": str(tmp_path)}}
    run = RunFolder.of(OmegaConf.create(config), command="train")
    for step in (1, 2):
        AtomicCheckpointIO().save_checkpoint(state(step), run.checkpoints / f"step={step}.ckpt")
    return run


def test_a_flipped_bit_at_any_of_100_places_is_found_and_the_checkpoint_before_it_used(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, places = run.checkpoints / "step=2.ckpt", random.Random(0)
    files = sorted(newest.iterdir())
    for trial in range(100):
        file = files[trial % len(files)]
        whole = file.read_bytes()
        changed = bytearray(whole)
        changed[places.randrange(len(whole))] ^= 1 << places.randrange(8)
        file.write_bytes(changed)
        assert run.checkpoint_to_resume() == run.checkpoints / "step=1.ckpt"
        aside = run.checkpoints / "step=2.ckpt.corrupt"
        aside.rename(newest)
        file.write_bytes(whole)
    assert step_of(run.checkpoint_to_resume()) == 2
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 100
    assert all("step=2.ckpt is damaged; going back to an older checkpoint (" in line for line in said)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999], ids="{:.1%}".format)
@pytest.mark.parametrize("name", ["state.pt", "weights.safetensors", "ema.safetensors", "manifest.json"])
def test_a_truncated_checkpoint_is_set_aside_for_the_one_before_it(share: float, name: str, run: RunFolder) -> None:
    file = run.checkpoints / "step=2.ckpt" / name
    os.truncate(file, int(file.stat().st_size * share))
    assert step_of(run.checkpoint_to_resume()) == 1
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step=1.ckpt", "step=2.ckpt.corrupt"]


def test_what_a_kill_left_half_done_is_gone_when_the_run_goes_on(run: RunFolder) -> None:
    half = run.checkpoints / ".step=3.ckpt.99.123.tmp"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    assert step_of(run.checkpoint_to_resume()) == 2
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step=1.ckpt", "step=2.ckpt"]


def test_another_rank_reads_and_changes_nothing(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.checkpoints / "step=2.ckpt" / "state.pt").write_bytes(b"damaged")
    (run.checkpoints / ".step=3.ckpt.99.123.tmp").mkdir()
    monkeypatch.setenv("RANK", "1")
    assert step_of(run.checkpoint_to_resume()) == 1
    assert len(list(run.checkpoints.iterdir())) == 3
