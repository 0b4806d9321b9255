"""Workers outlive a signal from anywhere, and end at once when their trainer says so."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from torch.utils.data import DataLoader

from ldm.data.worker_signals import outlive_stop


@pytest.fixture
def loader() -> Iterator[tuple[DataLoader, Iterator]]:
    """A loader of one worker that has given its first item."""
    loader = DataLoader(range(1000), batch_size=None, num_workers=1, prefetch_factor=1, worker_init_fn=outlive_stop)
    batches = iter(loader)
    assert next(batches) == 0
    yield loader, batches
    batches._shutdown_workers()


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
        worker.join(timeout=5)
        assert not worker.is_alive()
        assert time.monotonic() - start < 2
    finally:
        signal.signal(signal.SIGCHLD, previous)
