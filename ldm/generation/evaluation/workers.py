"""Work that several processes share: tasks that may be done again without harm, and who does which."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Task:
    """A piece of work that leaves a mark when it is done, and the same result however often it is done.

    Args:
        name: a file name, of its own among the tasks of a folder.
        is_done: whether the mark is there.
        run: does it.
    """

    name: str
    is_done: Callable[[], bool]
    run: Callable[[], None]


class Workers(Protocol):
    """How processes share tasks."""

    def do(self, tasks: Sequence[Task], folder: Path) -> None:
        """Returns when all tasks are done, here or elsewhere; `folder` is one that all processes see."""

    def once(self, task: Task, folder: Path) -> None:
        """Returns when a task that takes no model is done, by one of the processes."""


class FreeWorkers:
    """Any number of processes, started together or not: each takes tasks that none has taken, until all are done.

    Who is at work on a task holds a lock on a file, which the system takes away from a process that dies: another
    takes its task over. So a launcher of several processes, an array of jobs, or the same command in a second terminal
    all make an evaluation finish sooner.

    Args:
        report: told a folder's name, how many of its tasks are done, and of how many, whenever that changes.
    """

    def __init__(self, report: Callable[[str, int, int], None] | None = None) -> None:
        self.report = report

    def do(self, tasks: Sequence[Task], folder: Path) -> None:
        """As in `Workers`."""
        locks = folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        pending = [task for task in tasks if not task.is_done()]
        while pending:
            was_busy = False
            for task in pending:
                if _try(task, locks):
                    was_busy = True
                    self._tell(folder, tasks)
            pending = [task for task in pending if not task.is_done()]
            if pending and not was_busy:
                time.sleep(POLL_SECONDS)

    def _tell(self, folder: Path, tasks: Sequence[Task]) -> None:
        if self.report is not None:
            self.report(folder.name, sum(task.is_done() for task in tasks), len(tasks))

    def once(self, task: Task, folder: Path) -> None:
        """As in `Workers`."""
        self.do([task], folder)


class RankWorkers:
    """The ranks of a training, in step: rank r does tasks r, r + W, ..., and as many as every other rank.

    A rank whose tasks have run out does the last one once more, because a model whose weights are spread over the
    ranks computes on all of them or on none.

    Args:
        rank, world_size: this process among how many.
        barrier: waits for the other ranks.
    """

    def __init__(self, rank: int, world_size: int, barrier: Callable[[], None]) -> None:
        self.rank, self.world_size, self.barrier = rank, world_size, barrier

    def do(self, tasks: Sequence[Task], folder: Path) -> None:
        """As in `Workers`.

        Raises:
            RuntimeError: another rank's work cannot be seen from here.
        """
        for start in range(0, len(tasks), self.world_size):
            tasks[min(start + self.rank, len(tasks) - 1)].run()
        self.barrier()
        if missing := [task.name for task in tasks if not task.is_done()]:
            raise RuntimeError(
                f"got no {missing[0]} of another rank in {folder}, expected a folder that all ranks see; set the "
                "callback's folder to one on shared storage"
            )

    def once(self, task: Task, folder: Path) -> None:
        """As in `Workers`: rank 0 does it."""
        if self.rank == 0:
            task.run()
        self.barrier()


def _try(task: Task, locks: Path) -> bool:
    """Does the task if nobody else is at it; returns whether it did."""
    with _held(locks / task.name) as is_ours:
        if not is_ours or task.is_done():
            return False
        task.run()
        return True


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    with path.open("a+") as file:
        try:
            # Unlike flock's, no forked worker keeps this lock alive.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
