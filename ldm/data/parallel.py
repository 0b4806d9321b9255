"""The same work on many shards, in order, in one process or several."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def map_in_order(function: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int) -> Iterator[Result]:
    """Yield function(task) of every task, in order; with `workers` above 0 in that many processes.

    Raises ValueError for a negative number of workers, and whatever `function` raises.
    """
    if workers < 0:
        raise ValueError(f"workers: got {workers}, expected 0 for this process alone, or more")
    if workers == 0 or len(tasks) < 2:
        yield from map(function, tasks)
        return
    # Forking a process whose libraries run threads may deadlock.
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=get_context("spawn"))
    try:
        yield from pool.map(function, tasks)
    finally:
        pool.shutdown(cancel_futures=True)
