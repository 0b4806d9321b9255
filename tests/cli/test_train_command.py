"""`ldm train` from start to result: what it writes, how it stops, how it goes on."""

import csv
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import CONFIG_DIR, ROOT, environment, only, read_json

from ldm.training import checkpoint_io
from ldm.training.callbacks.preemption import AGREE_EVERY
from ldm.training.checkpoint_parts import read

TOY = "experiment=toy"


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step=")) for path in (run / "checkpoints").iterdir())


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return read(run / "checkpoints" / f"step={step:09d}.ckpt")["state_dict"]


def test_a_run_leaves_config_command_environment_metrics_checkpoints_and_result(
    ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ldm("train", TOY, "next_step='type this next'") == 0
    run = only(folder, "runs/toy/*")
    assert {path.name for path in run.iterdir()} >= {
        "checkpoints",
        "command.txt",
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "result.json",
    }
    assert [path.name for path in folder.iterdir()] == ["runs"]
    assert saved_steps(run) == [15, 20]
    assert [int(row["step"]) for row in metrics(run)] == list(range(20))
    result = read_json(run / "result.json")
    assert result["summary"]["size"] == 4
    assert result["summary"]["sum"] == pytest.approx(weights(run, 20)["layer.weight"].sum().item())
    printed = capsys.readouterr().out
    assert f"run folder  {run.relative_to(folder)}" in printed
    assert printed.splitlines()[-1].strip() == "type this next"


def test_a_checkpoint_holds_the_config_that_made_it(ldm: Callable[..., int], folder: Path) -> None:
    ldm("train", TOY, "trainer.max_steps=1")
    checkpoint = read(only(folder, "runs/toy/*/checkpoints/*"))
    assert checkpoint["config"]["model"]["_target_"] == "toy_training.ToyModel"
    assert checkpoint["config"]["run_dir"] == str(only(folder, "runs/toy/*"))


def test_ctrl_c_saves_says_how_to_go_on_and_the_same_command_goes_on(
    ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ldm("train", TOY, "model.kill_at=7", "run_id=mine") == 130
    run = folder / "runs" / "toy" / "mine"
    assert saved_steps(run) == [5, 8]
    assert not (run / "result.json").exists()
    checkpoint = "runs/toy/mine/checkpoints/step=000000008.ckpt"
    assert f"stopped; saved {checkpoint}; the same command goes on from there:" in capsys.readouterr().out
    assert ldm("train", TOY, "model.kill_at=7", "run_id=mine") == 0
    assert f"going on from {checkpoint}" in capsys.readouterr().out
    assert [int(row["step"]) for row in metrics(run)] == list(range(20))


def test_ctrl_c_stops_a_chain_and_a_sweep(ldm: Callable[..., int], folder: Path) -> None:
    assert ldm("train", "-m", TOY, "model.kill_at=3", "seed=1,2") == 130
    assert len(list(folder.glob("runs/toy/*"))) == 1


def test_resume_never_starts_anew_beside_the_old_run(ldm: Callable[..., int], folder: Path) -> None:
    ldm("train", TOY, "trainer.max_steps=2")
    ldm("train", TOY, "trainer.max_steps=2", "resume=never")
    first, second = sorted(folder.glob("runs/toy/*"))
    assert second.name == f"{first.name}-2"
    assert (second / "result.json").is_file()


def test_a_run_can_start_from_another_runs_checkpoint(ldm: Callable[..., int], folder: Path) -> None:
    ldm("train", TOY, "trainer.max_steps=10", "run_id=short")
    assert ldm("train", TOY, "resume=runs/toy/short", "run_id=long") == 0
    assert [int(row["step"]) for row in metrics(folder / "runs/toy/long")] == list(range(10, 20))


def test_a_truncated_newest_checkpoint_costs_only_the_steps_since_the_one_before(
    ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ldm("train", TOY, "model.kill_at=7")
    newest = only(folder, "runs/toy/*/checkpoints/step=000000008.ckpt")
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    assert ldm("train", TOY, "model.kill_at=null", f"run_id={newest.parent.parent.name}") == 0
    printed = capsys.readouterr().out
    assert "step=000000008.ckpt is damaged; going back to an older checkpoint (weights.safetensors has 50" in printed
    assert (newest.parent / "step=000000008.ckpt.corrupt" / "weights.safetensors").is_file()
    assert "going on from" in printed
    assert "step=000000005.ckpt" in printed


def test_a_place_that_checkpoints_cannot_be_written_to_ends_in_one_line_and_exit_code_4(
    ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "file").touch()
    assert ldm("train", TOY, f"callback.checkpoint.folder={folder}/file") == 4
    assert "file: got File exists, expected a folder that checkpoints can be written to" in capsys.readouterr().err
    assert not list(folder.glob("runs/toy/*/result.json"))


@pytest.mark.parametrize("io", ["atomic", "background"])
def test_a_disk_that_is_full_in_mid_run_ends_in_one_line_and_exit_code_4_and_the_run_goes_on_later(
    io: str,
    ldm: Callable[..., int],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = checkpoint_io.write

    def full(place: Path, *arguments: Any, **options: Any) -> Any:
        if place.name == "step=000000015.ckpt":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(place, *arguments, **options)

    monkeypatch.setattr(checkpoint_io, "write", full)
    words = [TOY, f"checkpoint_io={io}", "model.seconds_per_step=0.02"]
    assert ldm("train", *words) == 4
    said = capsys.readouterr().err.splitlines()
    assert "error: step=000000015.ckpt: could not be saved to" in said[-1]
    assert "(No space left on device; it needs" in said[-1]
    run = only(folder, "runs/toy/*")
    assert saved_steps(run) == [5, 10]
    assert len(metrics(run)) <= 16
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert ldm("train", *words) == 0
    assert "going on from" in capsys.readouterr().out


def test_checkpoints_in_another_store_are_found_again(
    ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [TOY, "model.kill_at=7", "callback.checkpoint.folder=memory://store/x", "checkpoint_io=background"]
    assert ldm("train", *words) == 130
    assert ldm("train", *words) == 0
    assert "going on from memory:///store/x/step=000000008.ckpt" in capsys.readouterr().out
    assert not (only(folder, "runs/toy/*") / "checkpoints").exists()


def test_how_checkpoints_are_written_leaves_the_run_the_same(ldm: Callable[..., int], folder: Path) -> None:
    assert ldm("train", TOY, "model.kill_at=7") == 130
    assert ldm("train", TOY, "model.kill_at=7", "checkpoint_io=background") == 0
    assert saved_steps(only(folder, "runs/toy/*")) == [15, 20]


def test_a_sweep_makes_a_run_folder_for_each_job_and_no_litter(
    ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ldm("train", "-m", TOY, "model.learning_rate=0.1,0.2", "trainer.max_steps=2") == 0
    found = [read_json(path)["summary"]["learning_rate"] for path in folder.glob("runs/toy/*/result.json")]
    assert sorted(found) == [0.1, 0.2]
    assert [path.name for path in folder.iterdir()] == ["runs"]
    assert "job 1: train experiment=toy model.learning_rate=0.2 trainer.max_steps=2" in capsys.readouterr().out


def test_a_mistake_in_one_job_of_a_sweep_does_not_stop_the_others(ldm: Callable[..., int], folder: Path) -> None:
    assert ldm("train", "-m", TOY, "model.width=0,1", "trainer.max_steps=2") == 2
    assert len(list(folder.glob("runs/toy/*/result.json"))) == 1


def test_the_profiler_writes_into_the_run_folder(ldm: Callable[..., int], folder: Path) -> None:
    assert ldm("train", TOY, "debug=profile", "trainer.max_steps=2") == 0
    assert "run_training_batch" in only(folder, "runs/toy/*/fit-profile.txt").read_text()


def test_overfit_sees_one_batch_only(ldm: Callable[..., int], folder: Path) -> None:
    assert ldm("train", TOY, "debug=overfit", "trainer.max_steps=40", "model.learning_rate=0.05") == 0
    rows = metrics(only(folder, "runs/toy/*"))
    assert [row["epoch"] for row in rows] == [row["step"] for row in rows] == ["9", "19", "29", "39"]
    losses = [float(row["train/loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
def test_two_processes_make_one_run_stop_at_the_same_step_on_ctrl_c_and_go_on(
    ldm_process: Callable[..., subprocess.CompletedProcess[str]], folder: Path
) -> None:
    words = [TOY, "trainer.devices=2", "strategy=ddp", "model.seconds_per_step=0.05", "trainer.max_steps=40"]
    # A new folder, which both are to find.
    command = [sys.executable, "-m", "ldm.cli.main", "train", *CONFIG_DIR, *words, "resume=never"]
    with subprocess.Popen(command, cwd=folder, env=environment(), start_new_session=True) as training:
        deadline = time.monotonic() + 120
        while not list(folder.glob("runs/toy/*/checkpoints/step=000000005.ckpt")) and time.monotonic() < deadline:
            time.sleep(0.02)
        # What a terminal does: everyone in the foreground gets the signal.
        os.killpg(training.pid, signal.SIGINT)
        assert training.wait(60) == 130
    run = only(folder, "runs/toy/*")
    stopped_at = saved_steps(run)[-1]
    assert stopped_at % AGREE_EVERY == 0
    again = ldm_process("train", *words)
    assert again.returncode == 0, again.stderr
    assert f"step={stopped_at:09d}.ckpt" in again.stdout
    assert again.stdout.count("finished in") == 1
    assert len(list(folder.glob("runs/toy/*/result.json"))) == 1


@pytest.mark.slow
def test_under_torchrun_rank_0_runs_the_links_alone_and_all_train_the_last(folder: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "train.py")]
    words = [*launcher, *CONFIG_DIR, "experiment=toy_after", "trainer.devices=2", "strategy=ddp"]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[2/3] train experiment=toy\n") == 1
    assert len(list(folder.glob("runs/*/*/result.json"))) == 3
