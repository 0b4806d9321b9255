"""What befalls one of two processes is answered by both, at the same step."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_colours
from torch.testing import assert_close

from ldm.training.callbacks.preemption import AGREE_EVERY
from ldm.training.checkpoint_parts import read

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have been through all of it."""
    folder = tmp_path_factory.mktemp("faults")
    write_colours(folder / "colours")
    paths = os.pathsep.join([os.fspath(HERE.parents[1]), os.fspath(HERE)])
    scenarios = ["clean", "broken", "rollback", "stopped", "resumed"]
    scenarios += [f"autoencoder {scenario}" for scenario in ("clean", "stopped", "resumed")]
    finished = subprocess.run(
        [sys.executable, os.fspath(HERE / "fault_worker.py"), os.fspath(folder), *scenarios],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    return folder


def results(folder: Path, scenario: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{scenario}-{rank}.pt", weights_only=True) for rank in range(2)]


def record(folder: Path, scenario: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / scenario / "skipped.jsonl").read_text().splitlines()]


def test_sigterm_to_one_rank_stops_both_at_the_same_step_within_moments(folder: Path) -> None:
    first, second = (result["facts"] for result in results(folder, "stopped"))
    assert first["signal"] == second["signal"] == signal.SIGTERM
    assert first["step"] == second["step"] <= AGREE_EVERY
    assert second["seconds"] < 10
    assert (folder / "stopped" / "checkpoints" / f"step={first['step']:09d}.ckpt").exists()


@pytest.mark.parametrize("model", ["", "autoencoder "])
def test_the_stopped_run_goes_on_bit_for_bit_with_the_same_metrics(model: str, folder: Path) -> None:
    for resumed, clean in zip(results(folder, f"{model}resumed"), results(folder, f"{model}clean"), strict=True):
        assert_close(resumed["weights"], clean["weights"], rtol=0, atol=0)
    stopped, whole = (folder / f"{model}{name}" for name in ("stopped", "clean"))
    assert (stopped / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    first, second = (read(run / "checkpoints" / "step=000000012.ckpt")["optimizer_states"] for run in (stopped, whole))
    assert_close(first, second, rtol=0, atol=0)


def test_a_loss_that_is_not_a_number_on_one_rank_is_left_out_on_both_and_written_once(folder: Path) -> None:
    first, second = results(folder, "broken")
    assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert all(value.isfinite().all() for value in first["weights"].values())
    assert [(line["step"], line["reason"]) for line in record(folder, "broken")] == [(5, "not finite")]


def test_both_ranks_go_back_to_the_same_checkpoint_and_finish(folder: Path) -> None:
    first, second = results(folder, "rollback")
    assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert record(folder, "rollback")[-1] == {"event": "rollback", "at": 10, "to": 8}
    assert first["facts"]["step"] == second["facts"]["step"] == 12
