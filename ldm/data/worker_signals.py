"""Lets data-loader workers outlive a signal that is meant for the trainer, and the trainer outlive its workers."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

Batch = TypeVar("Batch")


class WorkerLoader(DataLoader[Batch]):
    """A DataLoader whose workers outlive signals, and which leaves the global random state alone."""

    def __init__(self, dataset: Any, **options: Any) -> None:
        super().__init__(dataset, generator=torch.Generator(), worker_init_fn=outlive_stop, **options)

    def __iter__(self) -> Any:
        with starting_workers():
            return super().__iter__()


def outlive_stop(worker: int) -> None:
    """Keep this worker at work when a terminal or a cluster signals all processes of a run.

    Without it the workers die at once, and the trainer with them, before it has saved anything. SIGTERM of the trainer,
    which is how a loader ends a worker, still ends it.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    """End the process at its parent's SIGTERM; only waiting for a signal tells who sent it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def starting_workers() -> Iterator[None]:
    """While a loader starts its workers: they block SIGTERM from their first moment on, and die unnoticed at first.

    Else a thread that a library starts in a forked worker at once, as OpenTelemetry's does, takes the signal that
    `outlive_stop` blocks. And the loader would raise the death of a worker wherever the trainer then is, in the middle
    of an optimizer step for one, instead of when it waits for a batch.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class WorkerDied(RuntimeError):
    """A worker of a loader is gone."""


def next_batch(batches: Iterator[Batch]) -> Batch:
    """Return a loader's next batch; raises WorkerDied where a worker is gone, also while it hands one over."""
    try:
        return next(batches)
    except (ConnectionError, EOFError) as error:
        if "in DataLoader worker process" in str(error):  # raised there, by a worker that goes on
            raise
        raise WorkerDied("a DataLoader worker exited unexpectedly while it handed over a batch") from error
    except RuntimeError as error:
        if re.search(r"DataLoader worker \(pid\S* .*\) (is killed by|exited unexpectedly)", str(error)) is None:
            raise
        raise WorkerDied(str(error)) from error
