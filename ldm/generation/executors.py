"""Where the tasks of a piece of work run: this process, several, ranks of a launcher, a SLURM array, or Ray.

A piece of work is a number of tasks, each idempotent: done, its result is on the disk under its final name, and whoever
asks finds it there. So a killed run is started again and does what is missing, and no executor needs to remember.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, Protocol

Progress = Callable[[int, int], None]
# In a process that `Local` started: its number among them.
NUMBER_VARIABLE = "LDM_WORKER"
# Seconds between two looks at what other processes have done.
POLL = 0.5


class Work(Protocol):
    """Tasks 0 to num_tasks - 1, in an object that can be pickled; a process loads what it needs on first use."""

    @property
    def num_tasks(self) -> int:
        """How many tasks there are."""
        ...

    def is_done(self, task: int) -> bool:
        """Whether a task's whole result is on the disk: a cheap question, asked again and again."""
        ...

    def do(self, task: int) -> None:
        """Does a task; its result depends on the task alone and appears as a whole or not at all."""
        ...


class Executor(Protocol):
    """Does every task of some work that is not done yet.

    Attributes:
        is_here: whether tasks run in the process that calls `run`, with what it has loaded already.
    """

    @property
    def is_here(self) -> bool: ...

    def run(self, work: Work, *, progress: Progress = lambda done, total: None) -> None:
        """Returns, in every process that calls it, when all tasks are done.

        Args:
            progress: is told how many tasks are done, and of how many.

        Raises:
            RuntimeError: some tasks did not get done; and whatever a task raises.
        """
        ...


@dataclass(frozen=True)
class Local:
    """On this machine: in this process, or in `workers` of its own, each taking the next task when it is ready."""

    workers: int = 0

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"executor.workers: got {self.workers}, expected 0 for this process alone, or more")

    @property
    def is_here(self) -> bool:
        return not self.workers

    def run(self, work: Work, *, progress: Progress = lambda done, total: None) -> None:
        missing = missing_tasks(work)
        start = work.num_tasks - len(missing)
        for count, _ in enumerate(self._results(work, missing), start=1):
            progress(start + count, work.num_tasks)
        check_done(work)

    def _results(self, work: Work, missing: Sequence[int]) -> Iterator[None]:
        if not self.workers or not missing:
            yield from map(work.do, missing)
            return
        # Forking a process whose libraries run threads may deadlock.
        context, count = get_context("spawn"), min(self.workers, len(missing))
        numbers = context.Queue()
        for number in range(count):
            numbers.put(number)
        pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker, initargs=(work, numbers))
        try:
            yield from pool.map(_do, missing)
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Torchrun:
    """In the processes of torchrun, srun or another launcher: rank r of w does tasks r, r + w, r + 2w, ...

    The ranks never speak to each other. Each looks at the disk until the others have done their part, and gives up
    after `patience` seconds in which the first task that is missing did not get done.
    """

    patience: float = 3600.0
    is_here: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.patience <= 0:
            raise ValueError(f"executor.patience: got {self.patience}, expected seconds, more than 0")

    def run(self, work: Work, *, progress: Progress = lambda done, total: None) -> None:
        rank, world_size = launched_rank()
        own = range(rank, work.num_tasks, world_size)
        for done, task in enumerate(own, start=1):
            if not work.is_done(task):
                work.do(task)
            progress(done, len(own))
        # One task is asked for at a time: there may be very many, and a look at one is a look at a shared disk.
        missing, since = iter(range(work.num_tasks)), time.monotonic()
        awaited = next(missing, None)
        while awaited is not None:
            if work.is_done(awaited):
                awaited, since = next(missing, None), time.monotonic()
            elif time.monotonic() - since > self.patience:
                check_done(work)
            else:
                time.sleep(POLL)


@dataclass(frozen=True)
class Submitit:
    """As one array of jobs on SLURM, through submitit: job j of n does tasks j, j + n, j + 2n, ...

    A job that SLURM preempts goes back into the queue and does what is missing. Interrupting the command leaves the
    jobs running; the same command later waits for whatever is still to be done.

    Args:
        folder: of submitit's logs and pickles, on a file system that all machines share.
        jobs: the most jobs of the array.
        cluster: slurm; local (processes of this machine) or debug (this process) to try it.
        timeout_min: minutes that a job may run.
        parameters: more of submitit's own, such as {slurm_partition: gpu, gpus_per_node: 1, mem_gb: 32}.
    """

    folder: str
    jobs: int = 8
    cluster: str = "slurm"
    timeout_min: int = 240
    parameters: dict[str, Any] = field(default_factory=dict)
    is_here: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.cluster not in ("slurm", "local", "debug"):
            raise ValueError(f"executor.cluster: got {self.cluster}, expected one of slurm, local, debug")
        if self.jobs < 1:
            raise ValueError(f"executor.jobs: got {self.jobs}, expected at least 1")

    def run(self, work: Work, *, progress: Progress = lambda done, total: None) -> None:
        import submitit

        missing = missing_tasks(work)
        if not missing:
            return
        count = min(self.jobs, len(missing))
        executor = submitit.AutoExecutor(folder=Path(self.folder), cluster=self.cluster)
        executor.update_parameters(timeout_min=self.timeout_min, **self.parameters)
        if self.cluster == "slurm":
            executor.update_parameters(slurm_array_parallelism=count)
        jobs = executor.map_array(Share(work), [missing[number::count] for number in range(count)])
        for job in jobs:
            job.result()
            progress(work.num_tasks - len(missing_tasks(work)), work.num_tasks)
        check_done(work)


class Share:
    """Some tasks of some work, as submitit calls it in a job; may be preempted."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, tasks: Sequence[int]) -> None:
        """Does those that are not done."""
        for task in tasks:
            if not self.work.is_done(task):
                self.work.do(task)

    def checkpoint(self, tasks: Sequence[int]) -> Any:
        """What submitit hands to SLURM when the job is preempted: the same share once more."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, tasks)


@dataclass(frozen=True)
class Ray:
    """In actors of Ray, each of which takes the next task when it is ready; one that dies is started again.

    Args:
        workers: the number of actors.
        num_cpus, num_gpus: what an actor reserves.
        address: of a running cluster; null starts one on this machine, for as long as the work takes.
        restarts: how often an actor, and a task of it, is tried again after its machine or process died.
    """

    workers: int = 1
    num_cpus: float = 1
    num_gpus: float = 0
    address: str | None = None
    restarts: int = 3
    is_here: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"executor.workers: got {self.workers}, expected at least 1 actor")

    def run(self, work: Work, *, progress: Progress = lambda done, total: None) -> None:
        ray = _ray()
        missing = missing_tasks(work)
        if not missing:
            return
        was_started = ray.is_initialized()
        if not was_started:
            ray.init(**self._cluster())
        try:
            options = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "max_restarts": self.restarts}
            actor = ray.remote(max_task_retries=self.restarts, **options)(Worker)
            actors = [actor.remote(work) for _ in range(min(self.workers, len(missing)))]
            pool = ray.util.ActorPool(actors)
            start = work.num_tasks - len(missing)
            results = pool.map_unordered(lambda worker, task: worker.do.remote(task), missing)
            for count, _ in enumerate(results, start=1):
                progress(start + count, work.num_tasks)
        finally:
            if not was_started:
                ray.shutdown()
        check_done(work)

    def _cluster(self) -> dict[str, Any]:
        if self.address is not None:
            return {"address": self.address, "log_to_driver": False}
        cpus = max(1, round(self.workers * self.num_cpus))
        return {"num_cpus": cpus, "include_dashboard": False, "log_to_driver": False}


class Worker:
    """What Ray's actors are made of."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def do(self, task: int) -> None:
        """Does a task, unless a try before this one did."""
        if not self.work.is_done(task):
            self.work.do(task)


def worker_number() -> int:
    """Which of the processes on this machine this is, by which it picks a GPU; 0 where it is alone."""
    return int(os.environ.get(NUMBER_VARIABLE) or os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def launched_rank() -> tuple[int, int]:
    """(rank, world size) as torchrun or srun tell them.

    Raises:
        ValueError: no launcher started this process.
    """
    for rank, world_size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and world_size in os.environ:
            return int(os.environ[rank]), int(os.environ[world_size])
    raise ValueError(
        "executor: got torchrun without a launcher, expected RANK and WORLD_SIZE, or srun's; start it as "
        "torchrun --nproc-per-node 2 -m ldm.cli.main ..., or choose executor=local"
    )


def missing_tasks(work: Work) -> list[int]:
    """The tasks that are not done, in order."""
    return [task for task in range(work.num_tasks) if not work.is_done(task)]


def check_done(work: Work) -> None:
    """Raises RuntimeError where tasks are not done."""
    if missing := missing_tasks(work):
        raise RuntimeError(
            f"got {len(missing)} of {work.num_tasks} tasks not done, first task {missing[0]}, expected none; start the "
            "same command again: it does what is missing"
        )


def _ray() -> Any:
    try:
        import ray
        import ray.util
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ValueError(
            "executor: got ray, expected the package ray to be installed; install it with: pip install 'ldm[ray]'"
        ) from error
    return ray


# In a process that `Local` started: the work, with whatever it has loaded.
_work: list[Work] = []


def _start_worker(work: Work, numbers: Any) -> None:
    os.environ[NUMBER_VARIABLE] = str(numbers.get())
    _work.append(work)


def _do(task: int) -> None:
    _work[0].do(task)
