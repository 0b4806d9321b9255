"""The loggers that a run can choose."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TOY = "experiment=toy"


def test_tensorboard_events_lie_in_the_run_folder(ldm: Callable[..., int], folder: Path) -> None:
    assert ldm("train", TOY, "logger=default", "trainer.max_steps=3") == 0
    events = EventAccumulator(str(only(folder, "runs/toy/*/tensorboard")))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2]


@pytest.mark.slow
def test_wandb_works_offline_and_keeps_its_id_when_a_run_goes_on(
    ldm: Callable[..., int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = [TOY, "logger=wandb", "logger.wandb.offline=true", "run_id=mine", "model.kill_at=3", "trainer.max_steps=6"]
    assert ldm("train", *words) == 130
    assert ldm("train", *words) == 0
    run = folder / "runs" / "toy" / "mine"
    offline = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert len(offline) == 2
    # W&B adds a number where two starts share a second.
    assert all("-toy-mine" in name for name in offline)
    assert (run / "metrics.csv").is_file()
    assert [path.name for path in folder.iterdir()] == ["runs"]


@pytest.mark.slow
def test_wandb_without_a_key_is_one_line_that_names_the_offline_way(
    ldm_process: Callable[..., subprocess.CompletedProcess[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))
    done = ldm_process("train", TOY, "logger=wandb", "trainer.max_steps=1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert done.stderr.splitlines()[-1].endswith("Or keep the run on this machine: logger.wandb.offline=true")


@pytest.mark.slow
def test_each_job_of_a_sweep_is_a_wandb_run_of_its_own(
    ldm: Callable[..., int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert ldm("train", "-m", TOY, "logger=wandb", "seed=1,2", "trainer.max_steps=1") == 0
    runs = sorted(path.name for path in folder.glob("runs/toy/*"))
    offline = [path.name for path in folder.glob("runs/toy/*/wandb/offline-run-*")]
    assert sorted(name.rpartition("-")[2] for name in offline) == runs
