"""A multirun whose jobs run in other processes: what they complain of, their exit code, the page over all of them."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import CONFIG_DIR, only, read_json
from hydra import initialize_config_dir
from hydra.errors import MissingConfigException

from ldm.cli.compose import conf_folder, explain
from ldm.cli.main import main

# Refused before anything heavy is imported.
WRONG = ["experiment=toy", "resume=no_such_folder,never_was"]


def test_jobs_that_fail_in_joblib_workers_are_said_and_decide_the_exit_code(
    ldm_process: Callable[..., subprocess.CompletedProcess[str]], folder: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = ldm_process("train", "-m", *WRONG, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert done.returncode == 2
    ending = done.stderr.splitlines()[-2:]
    assert ending[0].startswith("error: job 0: resume: got no_such_folder, which does not exist")
    assert ending[1].startswith("error: job 1: resume: got never_was, which does not exist")
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_jobs_of_submitit_that_fail_leave_their_logs(
    ldm_process: Callable[..., subprocess.CompletedProcess[str]], folder: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = ldm_process("train", "-m", *WRONG, "hydra/launcher=submitit_local")
    assert done.returncode == 2
    assert "error: job 1: resume: got never_was, which does not exist" in done.stderr
    logs = only(folder, "ldm-jobs-*") / ".submitit"
    assert f"what the jobs wrote: {logs.parent.name}/.submitit" in done.stdout
    assert "error: resume: got no_such_folder" in "".join(path.read_text() for path in logs.rglob("*_log.err"))


@pytest.mark.slow
def test_evaluations_of_joblib_workers_end_with_one_page(
    workplace: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    shutil.copytree(workplace / "runs", folder / "runs")
    run = only(folder, "runs/toy_pictures/*")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    measured = ["metric=[toy_fid]", "num_samples=6", "report=null", f"checkpoint={run}", "guidance.scale=1,2"]
    assert main(["evaluate", "-m", *CONFIG_DIR, *measured, "hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]) == 0
    assert "2 evaluations in" in capsys.readouterr().out
    found = read_json(only(run, "evaluations/sweep-*/comparison.json"))["evaluations"]
    assert [one["protocol"]["guidance"]["scale"] for one in found] == [1.0, 2.0]


def test_options_of_hydra_may_stand_behind_overrides(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "experiment=toy", "seed=7", "--cfg", "job", *CONFIG_DIR, "model.width=9"]) == 0
    printed = capsys.readouterr().out
    assert "seed: 7\n" in printed
    assert "  width: 9\n" in printed


def test_a_launcher_that_is_not_installed_is_named_with_its_extra() -> None:
    missing = MissingConfigException("Could not find", missing_cfg_file="hydra/launcher/joblib", options=["basic"])
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        line = explain(missing, "train", ["hydra/launcher=joblib"])
    assert line == "hydra/launcher=joblib: it is not installed; install it with: pip install 'ldm[joblib]'"
