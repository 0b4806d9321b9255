"""How `ldm train` ends before its end: exit codes, what is saved, and SLURM's queue."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import only

TOY = "experiment=toy"
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step=")) for path in (run / "checkpoints").glob("step=*.ckpt"))


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of SLURM's, with a `scontrol` that notes what it is asked."""
    folder = tmp_path_factory.mktemp("slurm")
    script = f'#!/bin/sh\necho "$@" >> {folder}/calls\n[ "$1" = show ] && cat {folder}/job || exit 0\n'
    (folder / "scontrol").write_text(script)
    (folder / "scontrol").chmod(0o755)
    (folder / "job").write_text("JobId=4711 JobName=train Requeue=1 Restarts=0\n")
    (folder / "calls").touch()
    # All that makes Lightning take itself for a task of SLURM's.
    tasks = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "train"}
    for name, value in {**tasks, "JOB_ID": "4711", "NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def calls(slurm: Path) -> list[str]:
    return (slurm / "calls").read_text().splitlines()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_ends_with_143_and_the_same_command_goes_on(
    number: signal.Signals, ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [TOY, "run_id=mine", "model.kill_at=7", f"model.signal_number={int(number)}"]
    assert ldm("train", *words) == 143
    run = folder / "runs" / "toy" / "mine"
    assert saved_steps(run) == [5, 8]
    checkpoint = "runs/toy/mine/checkpoints/step=000000008.ckpt"
    expected = f"stopped by {number.name}; saved {checkpoint}; the same command goes on from there:"
    assert expected in capsys.readouterr().out
    assert ldm("train", *words) == 0
    assert f"going on from {checkpoint}" in capsys.readouterr().out
    assert (run / "result.json").is_file()


def test_a_signal_in_the_last_step_stops_before_what_follows_training(ldm: Callable[..., int], folder: Path) -> None:
    words = [TOY, "model.kill_at=19", "model.signal_number=15"]
    assert ldm("train", *words) == 143
    run = only(folder, "runs/toy/*")
    assert saved_steps(run) == [15, 20]
    assert not (run / "sum.json").exists(), "what `finish` writes"
    assert ldm("train", *words) == 0
    assert (run / "result.json").is_file()


def test_a_signal_stops_a_sweep(ldm: Callable[..., int], folder: Path) -> None:
    assert ldm("train", "-m", TOY, "model.kill_at=3", "model.signal_number=15", "seed=1,2") == 143
    assert len(list(folder.glob("runs/toy/*"))) == 1


def test_a_signal_doubled_by_a_launcher_counts_once(ldm: Callable[..., int], folder: Path) -> None:
    assert ldm("train", TOY, "model.kill_at=7", "model.signal_number=15", "model.kill_again_after=0") == 143
    assert saved_steps(only(folder, "runs/toy/*")) == [5, 8]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_ends_at_once(
    number: signal.Signals, code: int, ldm: Callable[..., int], folder: Path
) -> None:
    """In the middle of the step, so without a checkpoint of it."""
    words = ["model.kill_at=7", f"model.signal_number={int(number)}", "model.kill_again_after=1.2"]
    assert ldm("train", TOY, *words) == code
    assert saved_steps(only(folder, "runs/toy/*")) == [5]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_slurm_gets_the_job_back_once(
    number: signal.Signals, slurm: Path, ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ldm("train", TOY, "model.kill_at=7", f"model.signal_number={int(number)}") == 143
    assert calls(slurm) == ["show job 4711", "requeue 4711"]
    run = only(folder, "runs/toy/*")
    assert saved_steps(run) == [5, 8]
    assert not list(folder.rglob("hpc_ckpt*"))
    assert f"stopped by {number.name}, and back in the queue; saved" in capsys.readouterr().out
    # What SLURM does next: it starts the same script again.
    assert ldm("train", TOY, f"run_id={run.name}") == 0
    assert (run / "result.json").is_file()
    assert len(calls(slurm)) == 2


@pytest.mark.parametrize(
    "words",
    [
        ["model.signal_number=15"],
        ["model.signal_number=10", "callback=[checkpoint,preemption]", "callback.preemption.requeue=[]"],
    ],
)
def test_a_termination_or_a_setting_requeues_nothing(
    words: list[str], slurm: Path, ldm: Callable[..., int], folder: Path
) -> None:
    assert ldm("train", TOY, "model.kill_at=7", *words) == 143
    assert saved_steps(only(folder, "runs/toy/*")) == [5, 8]
    assert calls(slurm) == []


def test_a_job_that_slurm_may_not_requeue_is_left_alone(slurm: Path, ldm: Callable[..., int]) -> None:
    (slurm / "job").write_text("JobId=4711 JobName=train Requeue=0\n")
    with pytest.warns(UserWarning, match="SLURM job 4711 may not be requeued: submit it with --requeue"):
        assert ldm("train", TOY, "model.kill_at=7", "model.signal_number=10") == 143
    assert calls(slurm) == ["show job 4711"]


def test_a_scontrol_that_fails_costs_the_queue_and_not_the_checkpoint(
    slurm: Path, ldm: Callable[..., int], folder: Path
) -> None:
    (slurm / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    with pytest.warns(UserWarning, match="SLURM job 4711 could not be requeued .*submit it again"):
        assert ldm("train", TOY, "model.kill_at=7", "model.signal_number=10") == 143
    assert saved_steps(only(folder, "runs/toy/*")) == [5, 8]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("signals=[SIGNONE]", "signals: got SIGNONE, expected names such as SIGTERM"),
        ("signals=[SIGTERM]", "requeue: got SIGUSR1, SIGUSR2, expected some of signals=SIGTERM"),
    ],
)
def test_a_wrong_setting_is_one_line(
    setting: str, message: str, ldm: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ldm("train", TOY, "callback=[preemption]", f"callback.preemption.{setting}") == 2
    assert message in capsys.readouterr().err


def test_divergence_ends_with_3_and_one_line_and_a_sweep_goes_on(
    ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guard = ["callback=[checkpoint,spike_guard]", "callback.spike_guard.patience=3"]
    # What happened is read before a checkpoint, here that of step 10.
    assert ldm("train", "-m", TOY, *guard, "model.nan_from=4,null", "trainer.max_steps=12") == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: training diverged at step 9: loss nan, gradient norm nan (not finite)")
    assert len(list(folder.glob("runs/toy/*/result.json"))) == 1
    (record,) = folder.glob("runs/toy/*/skipped.jsonl")
    written = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line.get("step") for line in written] == [4, 5, 6, 7, 8, 9, None]
    # Weights of the last good step are in every checkpoint since.
    assert saved_steps(record.parent) == [5, 10]


def test_a_disk_that_takes_no_checkpoint_ends_with_4_and_one_line(
    ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "file").touch()
    assert ldm("train", TOY, f"callback.checkpoint.folder={folder}/file/checkpoints") == 4
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {folder}/file/checkpoints: got Not a directory")
