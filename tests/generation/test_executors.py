"""Whoever runs it, every task gets done once, what is done stays, and a failure shows."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from toy_work import Squares

from ldm.generation.executors import Executor, Local, Ray, Submitit, Torchrun, launched_rank, worker_number

SQUARES = [0, 1, 4, 9, 16, 25, 36]


class FakeRay(ModuleType):
    """A stand-in for ray whose actors live in this process."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.told: dict[str, Any] = {}
        self.util = SimpleNamespace(ActorPool=FakePool)

    def is_initialized(self) -> bool:
        return "init" in self.told

    def init(self, **options: Any) -> None:
        self.told["init"] = options

    def shutdown(self) -> None:
        self.told["shutdown"] = True

    def remote(self, **options: Any) -> Any:
        self.told["options"] = options

        def decorate(kind: type) -> Any:
            def make(*arguments: Any) -> Any:
                self.told["actors"] = self.told.get("actors", 0) + 1
                actor = kind(*arguments)
                return SimpleNamespace(do=SimpleNamespace(remote=actor.do))

            return SimpleNamespace(remote=make)

        return decorate


class FakePool:
    def __init__(self, actors: list[Any]) -> None:
        self.actors = actors

    def map_unordered(self, function: Any, tasks: list[int]) -> Any:
        for number, task in enumerate(reversed(tasks)):
            yield function(self.actors[number % len(self.actors)], task)


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.util", ray.util)
    return ray


@pytest.fixture
def executor(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Executor:
    if request.param == "torchrun":
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
        return Torchrun()
    if request.param == "ray":
        request.getfixturevalue("fake_ray")
        return Ray(workers=2)
    if request.param == "submitit":
        return Submitit(str(tmp_path / "jobs"), jobs=3, cluster="debug")
    return Local()


EVERY = pytest.mark.parametrize("executor", ["local", "torchrun", "ray", "submitit"], indirect=True)


@EVERY
def test_every_task_gets_done_once_and_what_is_done_is_left_alone(executor: Executor, tmp_path: Path) -> None:
    work, told = Squares(tmp_path), []
    for task in (2, 5):
        work.do(task)
    executor.run(work, progress=lambda done, total: told.append((done, total)))
    assert work.results() == SQUARES
    assert sorted(task for _, task in work.log()) == list(range(7))
    assert told[-1] == (7, 7) and all(total == 7 for _, total in told)
    executor.run(work)
    assert len(work.log()) == 7


# Not submitit: its debug executor opens a debugger at the failure, which is what it is for.
@pytest.mark.parametrize("executor", ["local", "torchrun", "ray"], indirect=True)
def test_a_failing_task_is_told_and_leaves_the_rest_to_the_next_run(executor: Executor, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="task 3 fails"):
        executor.run(Squares(tmp_path, fails_at=3))
    executor.run(Squares(tmp_path))
    assert Squares(tmp_path).results() == SQUARES
    assert sorted(task for _, task in Squares(tmp_path).log()) == list(range(7))


def test_ray_starts_no_more_actors_than_tasks_and_ends_only_what_it_started(fake_ray: FakeRay, tmp_path: Path) -> None:
    Ray(workers=20, num_cpus=2, num_gpus=0.5, restarts=5).run(Squares(tmp_path))
    assert fake_ray.told["actors"] == 7
    assert fake_ray.told["options"] == {"num_cpus": 2, "num_gpus": 0.5, "max_restarts": 5, "max_task_retries": 5}
    assert fake_ray.told["init"]["num_cpus"] == 40 and fake_ray.told["shutdown"]
    del fake_ray.told["shutdown"]
    Ray(address="auto").run(Squares(tmp_path, num_tasks=8))
    assert "shutdown" not in fake_ray.told


def test_ray_that_is_not_installed_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"^executor: got ray, .* pip install 'ldm\[ray\]'$"):
        Ray().run(Squares(tmp_path))


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_ranks_share_the_tasks_and_wait_for_each_other(
    names: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(names[0], "1")
    monkeypatch.setenv(names[1], "2")
    with pytest.raises(RuntimeError, match=r"got 4 of 7 tasks not done, first task 0, .* start the same command again"):
        Torchrun(patience=0.01).run(Squares(tmp_path))
    assert [task for _, task in Squares(tmp_path).log()] == [1, 3, 5]
    monkeypatch.setenv(names[0], "0")
    Torchrun(patience=0.01).run(Squares(tmp_path))
    assert Squares(tmp_path).results() == SQUARES


def test_torchrun_without_a_launcher_says_how_to_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        launched_rank()


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: Local(-1), "executor.workers: got -1"),
        (lambda: Ray(workers=0), "executor.workers: got 0"),
        (lambda: Torchrun(patience=0), "executor.patience: got 0"),
        (lambda: Submitit("x", jobs=0), "executor.jobs: got 0"),
        (lambda: Submitit("x", cluster="pbs"), "executor.cluster: got pbs"),
    ],
)
def test_settings_that_cannot_be_are_refused(build: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build()


def test_a_preempted_job_goes_on_with_its_own_share(tmp_path: Path) -> None:
    from ldm.generation.executors import Share

    share = Share(Squares(tmp_path))
    again = share.checkpoint([4, 6])
    assert (again.function, again.args) == (share, ([4, 6],))
    Squares(tmp_path).do(4)
    again.function(*again.args)
    assert [task for _, task in Squares(tmp_path).log()] == [4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["submitit", "ray"])
def test_processes_share_the_tasks(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    work = Squares(tmp_path / "work")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for processes that only inherit the environment
    if kind == "ray":
        pytest.importorskip("ray")
    executors: dict[str, Any] = {
        "submitit": lambda: Submitit(str(tmp_path / "jobs"), jobs=2, cluster="local"),
        "ray": lambda: Ray(workers=2),
    }
    executors[kind]().run(work)
    assert work.results() == SQUARES
    processes = {process for process, _ in work.log()}
    assert os.getpid() not in processes and processes
    if kind == "submitit":
        assert len(processes) == 2
    assert worker_number() == 0
