"""Lets data-loader workers outlive a signal that is meant for the trainer, and the trainer outlive its workers."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def outlive_stop(worker: int) -> None:
    """Keep this worker at work when a terminal or a cluster signals all processes of a run; a `worker_init_fn`.

    Without it the workers die at once, and the trainer with them, before it has saved anything. SIGTERM of the trainer,
    which is how a loader ends a worker, still ends it.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    """End the process at its parent's SIGTERM; only waiting for a signal tells who sent it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def noticing_deaths_late() -> Iterator[None]:
    """While a loader starts its workers: a later death of one is noticed by the loader when it waits for a batch.

    The loader would otherwise raise it wherever the trainer then is, in the middle of an optimizer step for one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def is_death_of_worker(error: RuntimeError) -> bool:
    """Whether a loader says that one of its workers is gone."""
    return re.search(r"DataLoader worker \(pid\S* .*\) (is killed by|exited unexpectedly)", str(error)) is not None
