"""Going on with a run as a user does: after kill -9, with another model, and what a finished folder gives away."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import CONFIG_DIR, environment, only

TOY = "experiment=toy"


def test_a_checkpoint_of_another_model_is_one_line_and_exit_code_2_before_data_are_opened(
    ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ldm("train", TOY, "run_id=mine", "trainer.max_steps=5") == 0
    (folder / "runs/toy/mine/result.json").unlink()
    capsys.readouterr()
    # The data folder does not exist either: that is not reached.
    assert ldm("train", TOY, "run_id=mine", "model.width=3", "data.folder=nowhere") == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "a checkpoint of another model: of 2 tensors 2 of another size (layer." in told[0]
    assert "nowhere" not in told[0]


@pytest.mark.parametrize(
    "logger",
    ["logger=default", pytest.param("logger=wandb logger.wandb.offline=true", marks=pytest.mark.slow)],
)
def test_no_file_of_a_run_and_no_line_on_the_console_gives_a_secret_away(
    logger: str,
    ldm: Callable[..., int],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "hunter2hunter2")
    words = [
        TOY,
        *logger.split(),
        "trainer.max_steps=2",
        "+api_key=swordfish",
        "+header='bearer ${oc.env:SOME_SERVICE_TOKEN}'",
        "+mirror='s3://me:opensesame@store/x?X-Amz-Signature=0badcafe&part=1'",
    ]
    # W&B reads it.
    monkeypatch.setattr(sys, "argv", ["ldm", "train", *words])
    assert ldm("train", *words) == 0
    run = only(folder, "runs/toy/*")
    files = [path for path in run.rglob("*") if path.is_file()]
    written = b"\n".join(path.read_bytes() for path in files)
    printed = capsys.readouterr()
    assert {path.name for path in files} >= {"config.yaml", "config.json", "command.txt", "environment.json"}
    for secret in ("swordfish", "hunter2", "opensesame", "0badcafe"):
        assert secret.encode() not in written, secret
        assert secret not in printed.out + printed.err, secret
    assert b"part=1" in written
    if "wandb" in logger:
        assert any(path.suffix == ".wandb" for path in files)


@pytest.mark.slow
def test_after_kill_9_the_same_command_goes_on_and_loses_and_doubles_no_row_of_metrics_csv(
    ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [TOY, "model.seconds_per_step=0.15"]
    assert ldm("train", *words, "run_id=whole") == 0
    command = [sys.executable, "-m", "ldm.cli.main", "train", *CONFIG_DIR, *words, "run_id=killed"]
    run = folder / "runs" / "toy" / "killed"
    for step in (5, 10):
        with subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL) as training:
            deadline = time.monotonic() + 120
            while not (run / f"checkpoints/step={step:09d}.ckpt").exists() and time.monotonic() < deadline:
                time.sleep(0.002)
            training.send_signal(signal.SIGKILL)
        assert not (run / "result.json").exists()
    capsys.readouterr()
    assert ldm("train", *words, "run_id=killed") == 0
    assert "going on from runs/toy/killed/checkpoints/step=000000010.ckpt" in capsys.readouterr().out
    assert (run / "result.json").is_file()
    # The toy's own loader begins anew on resuming: what is compared is that no row is lost or doubled.
    rows = [(folder / "metrics.csv").read_text().splitlines() for folder in (run, run.with_name("whole"))]
    assert [row.partition(",")[0] for row in rows[0]] == [row.partition(",")[0] for row in rows[1]]
