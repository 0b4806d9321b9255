"""`ldm doctor`: what it prints, when it fails, and that each of its checks can."""

import copy
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_helpers import ROOT, read_json
from packaging.version import Version

from ldm.cli import doctor, doctor_machine, job
from ldm.cli.doctor_combinations import KNOWN, combinations
from ldm.cli.doctor_machine import Check, environment, storage, threads
from ldm.cli.doctor_ranks import judge


def test_a_sound_machine_passes_in_one_page(
    ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "swordfish")
    assert ldm("doctor", "ranks=false", "megabytes=1", "out=found.json") == 0
    printed = capsys.readouterr().out
    for name in ("python", "packages", "cpu", "threads", "disk", "free space", "TMPDIR", "file locks", "credentials"):
        assert f" {name} " in printed
    assert "SOME_API_KEY" in printed
    assert "swordfish" not in printed
    checks = read_json(folder / "found.json")["checks"]
    assert {check["status"] for check in checks} <= {"ok", "note"}
    assert [path.name for path in folder.iterdir()] == ["found.json"]


def test_a_failed_check_ends_in_one_line_and_exit_code_1(
    ldm: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert ldm("doctor", "ranks=false", "megabytes=1") == 1
    assert capsys.readouterr().err == "error: failed: TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD\n"


def test_a_wrong_setting_is_a_users_mistake(ldm: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert ldm("doctor", "megabytes=0") == 2
    assert "megabytes: got 0, expected at least 1" in capsys.readouterr().err


def test_faults_are_injected_where_the_harness_is_and_a_miss_fails(
    ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []

    def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        ran.append((words[1:], options["cwd"]))
        return subprocess.CompletedProcess(words, returncode=1)

    monkeypatch.setattr(doctor, "subprocess", SimpleNamespace(run=run))
    assert ldm("doctor", "--faults", "ranks=false", "megabytes=1") == 1
    assert ran == [(["-m", "tests.faults.bench"], ROOT)]
    assert capsys.readouterr().err.splitlines()[-1] == "error: the fault matrix has misses"
    monkeypatch.setattr(doctor, "conf_folder", lambda: folder / "conf")
    assert ldm("doctor", "faults=true", "ranks=false") == 2
    assert capsys.readouterr().err.startswith("error: faults: got true, expected a source checkout")
    assert len(ran) == 1


def test_other_ranks_leave_it_to_the_first_to_say_a_mistake(
    ldm: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(job.time, "sleep", waited.append)
    assert ldm("doctor", "megabytes=0") == 2
    assert waited == []
    monkeypatch.setenv("RANK", "1")
    assert ldm("doctor", "megabytes=0") == 2
    assert waited == [job.FIRST_RANK_SECONDS]


@pytest.mark.parametrize(
    ("installed", "name", "status"),
    [
        ({"lightning": "2.6.3"}, "lightning 2.6.2, 2.6.3", "FAILED"),
        ({"pytorch-lightning": "2.6.2"}, "pytorch-lightning 2.6.2, 2.6.3", "FAILED"),
        ({"pytorch-lightning": "2.6.5"}, "pytorch-lightning < 2.6.6", "FAILED"),
        ({"torch": "2.9.1"}, "torch < 2.10", "FAILED"),
        ({"hydra-core": "1.3.7"}, "hydra-core < 1.3.8", "FAILED"),
        ({"torchmetrics": "1.9.0", "transformers": "5.23.0"}, "torchmetrics 1.9 + transformers 5", "note"),
        ({"diffusers": "0.42.0"}, "diffusers < 0.42.1", "note"),
        ({"gradio": "6.15.2"}, "gradio < 6.16", "note"),
        ({"hydra-optuna-sweeper": "1.3.0"}, "hydra-optuna-sweeper", "note"),
        ({"img2dataset": "1.47", "webdataset": "1.0.2"}, "img2dataset + webdataset 1", "note"),
        ({"mosaicml-streaming": "0.13.0", "numpy": "2.4.6"}, "mosaicml-streaming + numpy 2.2", "note"),
    ],
    ids=str,
)
def test_every_known_bad_combination_is_recognised(installed: dict[str, str], name: str, status: str) -> None:
    found = {check.name: check.status for check in combinations({key: Version(v) for key, v in installed.items()})}
    assert found[name] == status
    assert name in {one.name for one in KNOWN}


def test_good_combinations_are_left_alone() -> None:
    good = {"torch": "2.15.0", "pytorch-lightning": "2.6.6", "torchmetrics": "1.9.1", "transformers": "5.23.0"}
    assert [check.status for check in combinations({key: Version(v) for key, v in good.items()})] == ["ok"]


def by_name(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


def test_too_many_threads_a_slow_disk_and_another_file_system_for_temporary_files_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads((os.cpu_count() or 1) + 1)  # which some versions of torch start at once
    try:
        assert by_name(threads())["threads"] == "note"
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(doctor_machine, "_speed", lambda *_: (3.0, 4000.0))
    if Path("/dev/shm").is_dir() and Path("/dev/shm").stat().st_dev != tmp_path.stat().st_dev:
        monkeypatch.setattr(doctor_machine.tempfile, "gettempdir", lambda: "/dev/shm")
        assert by_name(storage(tmp_path, megabytes=1))["TMPDIR"] == "note"
    assert by_name(storage(tmp_path / "not" / "there", megabytes=1))["disk"] == "note"


def test_a_disk_that_refuses_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor_machine, "_speed", refuse)
    (check,) = storage(tmp_path, megabytes=1)
    assert (check.status, "Read-only" in check.text) == ("FAILED", True)


def test_dangerous_variables_fail() -> None:
    assert (
        by_name(environment({"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}))["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "FAILED"
    )


def trial() -> dict[str, Any]:
    """What a sound trial finds: 24 samples, 6 a batch, 4 batches, shared by two ranks."""
    places = [(0, index) for index in range(24)]
    run = {
        "weights": {"w": torch.ones(3)},
        "gradients": {"w": torch.full((3,), 0.2)},
        "places": places,
        "average": 0.0,
        "scale": [0.1, 0.9],
    }
    halves = [[place for place in places if (place[1] // 3) % 2 == rank] for rank in range(2)]
    ranks = [{"straight": {**copy.deepcopy(run), "places": half}, "parts": copy.deepcopy(run)} for half in halves]
    return {"alone": run, "accumulated": copy.deepcopy(run), "ranks": ranks}


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    found = trial()
    node: Any = found
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return found


def test_a_sound_trial_passes() -> None:
    assert set(by_name(judge(trial())).values()) == {"ok"}


@pytest.mark.parametrize(
    ("check", "path", "value"),
    [
        ("parameters on all ranks", ("ranks", 1, "straight", "weights", "w"), torch.tensor([1, 1, 1 + 1e-6])),
        ("gradients", ("ranks", 1, "straight", "gradients", "w"), torch.tensor([0.2, 0.2, 0.2 + 1e-7])),
        ("gradients", ("alone", "gradients", "w"), torch.full((3,), 0.4)),
        ("samples", ("ranks", 1, "straight", "places"), [(0, index) for index in range(12)]),
        ("moving average", ("accumulated", "average"), 0.01),
        ("latent scale", ("ranks", 1, "straight", "scale"), [0.1, 0.91]),
        ("one process and two", ("alone", "weights", "w"), torch.full((3,), 1.01)),
        ("accumulated batches", ("accumulated", "weights", "w"), torch.full((3,), 1.01)),
        ("2 -> 1 -> 2 processes", ("ranks", 0, "parts", "weights", "w"), torch.full((3,), 1.01)),
    ],
)
def test_each_conclusion_can_fail(check: str, path: tuple[Any, ...], value: Any) -> None:
    assert by_name(judge(changed(path, value)))[check] == "FAILED"


@pytest.mark.slow
def test_two_processes_train_as_one_does(ldm: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert ldm("doctor", "megabytes=1") == 0
    printed = capsys.readouterr().out
    assert "2 -> 1 -> 2 processes" in printed
    assert "0 failed" in printed


@pytest.mark.slow
def test_a_process_that_fails_is_a_failed_check_with_what_it_said(tmp_path: Path) -> None:
    from ldm.training import trial as trial_module

    program = "import sys; sys.exit('RuntimeError: the wire is cut')"
    with pytest.raises(RuntimeError, match="the wire is cut"):
        trial_module.run(tmp_path, words=("-c", program))
