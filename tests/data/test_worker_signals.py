"""Workers outlive a signal from anywhere, and end at once when their trainer says so."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from ldm.data.worker_signals import WorkerDied, WorkerLoader, next_batch

LIBRARY = {"is_there": False}


def begin_a_thread() -> None:
    """What OpenTelemetry does in a process that was just forked."""
    if LIBRARY["is_there"]:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


os.register_at_fork(after_in_child=begin_a_thread)


@pytest.fixture(params=[False, True], ids=["alone", "with a thread of a library"])
def loader(request: pytest.FixtureRequest) -> Iterator[tuple[WorkerLoader, Iterator]]:
    """A loader of one worker that has given its first item; in its process a library may have begun a thread."""
    LIBRARY["is_there"] = request.param
    loader = WorkerLoader(range(1000), batch_size=None, num_workers=1, prefetch_factor=1)
    batches = iter(loader)
    assert next(batches) == 0
    yield loader, batches
    batches._shutdown_workers()
    LIBRARY["is_there"] = False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_from_outside_ends_no_worker(number: signal.Signals, loader: tuple) -> None:
    _, batches = loader
    # From another process, as a cluster sends it; twice, as a launcher may.
    for _ in range(2):
        subprocess.run(["kill", f"-{number.name[3:]}", str(batches._workers[0].pid)], check=True)
    assert [next(batches) for _ in range(20)] == list(range(1, 21))
    assert batches._workers[0].is_alive()


def test_sigterm_from_the_trainer_ends_a_worker_at_once(loader: tuple) -> None:
    _, batches = loader
    worker = batches._workers[0]
    # The loader must not take it for a crash while this test looks.
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        start = time.monotonic()
        os.kill(worker.pid, signal.SIGTERM)
        worker.join(timeout=20)
        assert not worker.is_alive()
        assert time.monotonic() - start < 4  # what a loader waits for a batch before it looks is 5 s
    finally:
        signal.signal(signal.SIGCHLD, previous)


def raising(error: Exception) -> Iterator[int]:
    raise error
    yield


KILLED = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), KILLED])
def test_a_worker_that_is_gone_is_told_also_while_it_hands_over_a_batch(error: Exception) -> None:
    with pytest.raises(WorkerDied, match="worker"):
        next_batch(raising(error))


@pytest.mark.parametrize(
    "error", [ConnectionResetError("Caught one in DataLoader worker process 0."), RuntimeError("no")]
)
def test_what_a_worker_raises_is_no_death(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        next_batch(raising(error))
    assert not isinstance(raised.value, WorkerDied)
