"""A stream of work for several processes, its results in order, with a bounded number of them under way."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
# Tasks under way for each process: enough that none waits while a slow one holds up the order.
AHEAD = 3


def stream_in_order(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int
) -> Generator[Result, None, None]:
    """Yield function(task) of every task, in order; with `workers` above 0 in that many processes.

    Tasks are drawn as they are needed, so that they may be without end. Processes end with the one that started them,
    even where that is killed. Raises whatever `function` raises, and ValueError for a process that died.
    """
    if workers == 0:
        yield from map(function, tasks)
        return
    stream = iter(tasks)
    # Forking a process whose libraries run threads may deadlock.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_follow_parent)
    try:
        waiting: deque[Future[Result]] = deque(pool.submit(function, task) for task in islice(stream, AHEAD * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, task) for task in islice(stream, 1))
    except BrokenProcessPool as error:
        raise ValueError(
            f"workers: got {workers}, of which one died, perhaps for want of memory; "
            "the same command goes on where it stopped, with fewer workers if need be"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
