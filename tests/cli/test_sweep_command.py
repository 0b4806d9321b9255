"""`ldm sweep` from start to best.yaml: what it leaves, how it prunes, how it goes on when it was killed."""

import csv
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest
import yaml
from cli_helpers import CONFIG_DIR, environment, only, read_json

from ldm.cli.main import main

STAND_IN = f"{sys.executable} -m sweep_stand_in"
FAST = ["experiment=toy", "objective=train/loss", f"launcher={STAND_IN}", "poll_seconds=0.02", "grace_seconds=5"]
RATE = "+space.model.learning_rate={low: 1e-4, high: 0.1, log: true}"


@pytest.fixture
def sweep(ldm: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a sweep of stand-ins in this process."""
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    return lambda *overrides: ldm("sweep", *FAST, *overrides)


def trials(folder: Path) -> list[dict[str, str]]:
    with only(folder, "runs/toy_sweep/*/trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def outcomes(folder: Path) -> list[str]:
    return [row["outcome"] for row in trials(folder)]


def wait_for(found: Callable[[], Any], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_sweep_leaves_a_table_a_page_and_the_best_trial_as_an_experiment(
    sweep: Callable[..., int], ldm: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(RATE, "+space.lr_schedule=[constant,cosine]", "num_trials=3", "num_workers=2") == 0
    rows = trials(folder)
    assert [row["outcome"] for row in rows] == ["finished"] * 3
    for row in rows:
        assert float(row["value"]) == pytest.approx(float(row["model.learning_rate"]) + 0.1)
    best = min(rows, key=lambda row: float(row["value"]))
    printed = capsys.readouterr().out
    assert f"trial {best['trial']} of 3: train/loss" in printed
    plots = re.findall("<svg.*?</svg>", only(folder, "runs/toy_sweep/*/report.html").read_text())
    assert [len(ElementTree.fromstring(plot)) > 3 for plot in plots] == [True] * 3
    # What it says to type next composes to the very run of the best trial.
    words = shlex.split(printed.strip().splitlines()[-1])
    assert words[:2] == ["ldm", "train"]
    assert subprocess.run([*STAND_IN.split(), *words[1:]], env=environment(), check=True, capture_output=True)
    assert len(list(folder.glob("runs/toy/*"))) == 3
    # And more trials add to the same sweep.
    assert sweep(RATE, "+space.lr_schedule=[constant,cosine]", "num_trials=4") == 0
    assert "3 of 4 trials done" in capsys.readouterr().out
    assert trials(folder)[:3] == rows
    assert [len(path.read_text().splitlines()) for path in folder.glob("runs/toy/*/starts.txt")] == [1] * 4


def test_a_killed_sweep_goes_on_with_the_trials_under_way(sweep: Callable[..., int], folder: Path) -> None:
    overrides = [RATE, "num_trials=2", "model.seconds_per_step=0.2"]
    words = [sys.executable, "-m", "ldm.cli.main", "sweep", *CONFIG_DIR, *FAST, *overrides]
    with subprocess.Popen(words, cwd=folder, env=environment(), stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: len(list(folder.glob("runs/toy/*/metrics.csv"))) == 1)
        process.send_signal(signal.SIGKILL)
    assert sweep(*overrides) == 0
    assert outcomes(folder) == ["finished"] * 2
    assert len(list(folder.glob("runs/toy/*"))) == 2
    # Nothing was trained twice.
    for path in folder.glob("runs/toy/*/metrics.csv"):
        assert len(path.read_text().splitlines()) == 11


def test_sigterm_stops_the_trials_too_and_the_same_command_goes_on(sweep: Callable[..., int], folder: Path) -> None:
    overrides = [RATE, "num_trials=1", "model.seconds_per_step=0.3"]
    words = [sys.executable, "-m", "ldm.cli.main", "sweep", *CONFIG_DIR, *FAST, *overrides]
    with subprocess.Popen(words, cwd=folder, env=environment(), stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: list(folder.glob("runs/toy/*/metrics.csv")))
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    stopped = only(folder, "runs/toy/*/metrics.csv").read_text()
    assert len(stopped.splitlines()) < 10
    assert outcomes(folder) == ["unfinished"]
    assert sweep(*overrides) == 0
    assert only(folder, "runs/toy/*/metrics.csv").read_text().startswith(stopped)
    assert outcomes(folder) == ["finished"]


def test_diverged_and_failed_trials_are_passed_over(
    sweep: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # This seed draws each of them once.
    assert (
        sweep("+space.model.width=[4,5,6,7]", "num_trials=4", "num_workers=2", "search=random", "retries=0", "seed=12")
        == 0
    )
    assert {row["model.width"]: (row["outcome"], row["reason"]) for row in trials(folder)} == {
        "4": ("finished", ""),
        "5": ("diverged", "training diverged at step 3"),
        "6": ("failed", "RuntimeError: the card fell out"),
        "7": ("diverged", "train/loss is not finite"),
    }
    assert "best          trial" in capsys.readouterr().out


def test_a_sweep_of_which_nothing_finishes_fails(sweep: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("+space.model.width=[5,6]", "num_trials=1") == 1
    assert "trials.csv tells why" in capsys.readouterr().err


def test_a_hopeless_trial_is_pruned(sweep: Callable[..., int], folder: Path) -> None:
    settings = ["pruner=median", "pruner.n_startup_trials=1", "pruner.n_warmup_steps=2", "model.seconds_per_step=0.1"]
    # This seed draws the good one first.
    assert sweep("+space.model.learning_rate=[0.001,5.0]", "num_trials=2", "seed=0", *settings) == 0
    good, hopeless = trials(folder)
    assert (good["model.learning_rate"], good["outcome"]) == ("0.001", "finished")
    assert (hopeless["model.learning_rate"], hopeless["outcome"]) == ("5.0", "pruned")
    assert len((Path(hopeless["run"]) / "metrics.csv").read_text().splitlines()) < 10
    assert not (Path(hopeless["run"]) / "result.json").exists()


def test_a_trial_that_died_is_taken_up_from_where_it_was(
    sweep: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(RATE, "num_trials=1", "model.kill_at=4", "retries=1") == 0
    assert "died with code -9; going on from its checkpoint" in capsys.readouterr().out
    run = Path(trials(folder)[0]["run"])
    assert len((run / "starts.txt").read_text().splitlines()) == 2
    assert len((run / "metrics.csv").read_text().splitlines()) == 11


def test_groups_and_choices_reach_best_yaml(
    sweep: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["num_trials=1", "schedule=cosine", "~callback.checkpoint.keep", "+extra.note='a, b'"]
    assert sweep("+space.sampler=[ddim,euler]", "+space.data.size=[4,5]", *overrides) == 0
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    assert "~callback.checkpoint.keep" in words
    assert main(["train", "--cfg", "job", *words[2:]]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    (row,) = trials(folder)
    assert config["sampler"]["_target_"].lower().endswith(row["sampler"])
    assert config["schedule"]["_target_"] == "ldm.diffusion.schedules.Cosine"
    assert config["extra"] == {"note": "a, b"}
    assert config["data"]["size"] == int(row["data.size"])
    assert "keep" not in config["callback"]["checkpoint"]


def test_best_yaml_of_a_debugged_sweep_elsewhere_is_the_very_run_of_the_best_trial(
    sweep: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(RATE, "num_trials=1", "paths.runs=else where", "debug=fast", "trainer.max_steps=7") == 0
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    said = subprocess.run(
        [*STAND_IN.split(), *words[1:]], env=environment(), check=True, capture_output=True, text=True
    )
    assert "finished before, nothing to do" in said.stdout
    assert len(list(folder.glob("else where/toy/*"))) == 1 and not (folder / "runs").exists()


def test_a_sweep_that_was_moved_is_the_same_sweep(
    sweep: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(RATE, "num_trials=1") == 0
    (folder / "runs").rename(folder / "moved")
    assert sweep(RATE, "num_trials=2", "paths.runs=moved") == 0
    assert "1 of 2 trials done" in capsys.readouterr().out


def test_two_trials_of_one_run_share_it(sweep: Callable[..., int], folder: Path) -> None:
    space = "+space.model.learning_rate=[0.001,0.002]"
    assert sweep(space, "num_trials=3", "num_workers=3", "model.seconds_per_step=0.05") == 0
    assert outcomes(folder) == ["finished"] * 3
    assert [len(path.read_text().splitlines()) for path in folder.glob("runs/toy/*/starts.txt")] == [1, 1]


def test_each_worker_has_its_devices(sweep: Callable[..., int], folder: Path) -> None:
    overrides = ["num_trials=2", "num_workers=2", "model.seconds_per_step=0.2", 'devices=["0,1","2,3"]']
    assert sweep(RATE, *overrides) == 0
    assert {path.read_text().strip() for path in folder.glob("runs/toy/*/starts.txt")} == {"0,1", "2,3"}


@pytest.mark.slow
def test_what_the_trials_require_runs_once(sweep: Callable[..., int], folder: Path) -> None:
    assert sweep(RATE, "num_trials=2", "requires=['shard dataset=toy_rows']") == 0
    assert len(only(folder, "runs/toy_rows/*/command.txt").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["+space.model.widht=[1,2]"], "space: model.widht: there is no such setting; did you mean model.width?"),
        (["+space.sampler=[ddim,eulr]"], "space: sampler=eulr: there is no such option; did you mean euler?"),
        ([RATE, "model.learning_rate=1"], "model.learning_rate: got it on the command line too"),
        ([], "space: got nothing to search; choose space=NAME"),
        (
            [RATE, "direction=minimise"],
            "direction: got minimise, expected minimize or maximize; did you mean minimize?",
        ),
        ([RATE, "run_id=mine"], "run_id: got mine, which all trials would share"),
        ([RATE, "resume=never"], "resume: got never, expected auto, or a checkpoint"),
        ([RATE, "num_trials=0"], "num_trials: got 0, expected a whole number from 1 on"),
        ([RATE, "devices=['0','1']"], "devices: got 2 for num_workers=1"),
        ([RATE, "+submitit.timeout_min=3"], "submitit: got settings without backend=submitit"),
        (
            [RATE, "backend=submitit"],
            "the package submitit is not installed; install it with: pip install 'ldm[slurm]'",
        ),
        ([RATE, "trainer.max_stepz=3"], "trainer.max_stepz: there is no such setting; did you mean trainer.max_steps?"),
        (["space=lerning_rate"], "space=lerning_rate: there is no such option; did you mean learning_rate?"),
    ],
)
def test_a_mistake_is_said_in_one_line_before_anything_runs(
    sweep: Callable[..., int],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    line: str,
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)  # as if it were not installed
    assert sweep(*overrides) == 2
    assert line in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_an_objective_that_no_trial_measures_is_said_with_the_nearest(
    sweep: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(RATE, "objective=train/los") == 2
    assert "objective: train/los: the run measured no such thing; did you mean train/loss?" in capsys.readouterr().err


def test_a_dry_run_says_what_would_run(
    sweep: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = [
        "backend=submitit",
        "+submitit.slurm_partition=gpu",
        "launcher=torchrun --nproc-per-node=2 -m ldm.cli.main",
    ]
    assert sweep(RATE, *cluster, "dry_run=true", "requires=['shard dataset=toy_rows']") == 0
    printed = capsys.readouterr().out
    assert "first, if it is not there yet: ldm shard dataset=toy_rows" in printed
    assert "torchrun --nproc-per-node=2 -m ldm.cli.main train --config-dir" in printed
    assert "model.learning_rate=0.0001" in printed
    assert "submitit slurm_partition: gpu" in printed
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("space", ["learning_rate", "optimization"])
def test_every_shipped_space_fits_the_quickstart(
    ldm: Callable[..., int], capsys: pytest.CaptureFixture[str], space: str
) -> None:
    assert ldm("sweep", f"space={space}", "dry_run=true") == 0
    assert "optimizer.lr=1e-05" in capsys.readouterr().out
    assert ldm("sweep", f"space={space}", "space.optimizer.lr.low=2e-6", "dry_run=true") == 0
    assert "optimizer.lr=2e-06" in capsys.readouterr().out


class Executor:
    """submitit's AutoExecutor, as far as a sweep knows it: a job runs when it is asked for."""

    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder: str, cluster: str | None = None) -> None:
        self.settings["cluster"] = cluster

    def update_parameters(self, **settings: Any) -> None:
        self.settings.update(settings)

    def submit(self, function: Callable[..., int], *arguments: Any) -> Any:
        code = function(*arguments)
        return SimpleNamespace(done=lambda: True, exception=lambda: None, result=lambda: code, cancel=lambda: None)


def test_trials_run_as_jobs_of_a_cluster_and_a_result_may_be_the_objective(
    sweep: Callable[..., int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("submitit")
    module.AutoExecutor = Executor
    monkeypatch.setitem(sys.modules, "submitit", module)
    cluster = ["backend=submitit", "+submitit.cluster=debug", "+submitit.timeout_min=5"]
    assert sweep(RATE, "num_trials=2", "objective=summary.learning_rate", "direction=maximize", *cluster) == 0
    assert Executor.settings == {"cluster": "debug", "timeout_min": 5}
    assert [row["value"] for row in trials(folder)] == [row["model.learning_rate"] for row in trials(folder)]


@pytest.mark.slow
def test_a_sweep_of_real_trainings_killed_and_resumed(folder: Path) -> None:
    settings = ["experiment=toy", "objective=train/loss", "num_trials=2", "num_workers=2", "poll_seconds=0.1", RATE]
    words = [sys.executable, "-m", "ldm.cli.main", "sweep", *CONFIG_DIR, *settings, "model.seconds_per_step=0.1"]
    with subprocess.Popen(words, cwd=folder, env=environment(), stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: list(folder.glob("runs/toy/*/checkpoints/step=*")), seconds=120)
        process.send_signal(signal.SIGKILL)
    again = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert outcomes(folder) == ["finished", "finished"]
    assert len(list(folder.glob("runs/toy/*"))) == 2
    for row in trials(folder):
        assert read_json(Path(row["run"]) / "result.json")["name"] == "toy"
