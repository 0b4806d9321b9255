"""Lets data-loader workers outlive a signal that is meant for the trainer, until the trainer itself ends them."""

import os
import signal
import threading


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
