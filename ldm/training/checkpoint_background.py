"""Saves checkpoints while training goes on, and says within one step when that fails."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ldm.training.checkpoint_files import Place
from ldm.training.checkpoint_io import AtomicCheckpointIO, refuse_options
from ldm.training.checkpoint_parts import snapshot


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """Copies the state to the CPU, then writes, verifies and removes in a thread of its own, in the order asked for.

    At most one save is under way: the next one waits for it. After a failure nothing is removed until a save
    succeeds again. `Checkpoints` calls `poll` at every step; Lightning's own asynchronous saving reports a
    failure up to two saves late, after having removed the older checkpoint.

    Args:
        attempts, wait_seconds: as in `AtomicCheckpointIO`.
    """

    def __init__(self, *, attempts: int = 3, wait_seconds: float = 1.0) -> None:
        super().__init__(attempts=attempts, wait_seconds=wait_seconds)
        self._thread: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []
        self._failed = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Place, storage_options: Any = None) -> None:
        """Waits for the save before, copies the state and returns; what fails is raised by `poll` and `join`.

        Raises:
            StorageError: an earlier save failed.
        """
        refuse_options(storage_options)
        self.join()
        copied = snapshot(checkpoint)
        self._submit(lambda: self._save_copy(copied, path))

    def load_checkpoint(
        self, path: Place, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As in `AtomicCheckpointIO`, after what is under way."""
        self.join()
        return super().load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: Place) -> None:
        """Removes in turn, behind a save under way that succeeds, a checkpoint that two other valid ones replace."""
        self._submit(lambda: self._remove(path))

    def poll(self) -> None:
        """Raises the error of a finished save, once."""
        done = [job for job in self._jobs if job.done()]
        self._jobs = [job for job in self._jobs if job not in done]
        for job in done:
            job.result()

    def join(self) -> None:
        """Waits until everything is saved; raises what went wrong, once."""
        while self._jobs:
            self._jobs.pop(0).result()

    def teardown(self) -> None:
        """Waits for everything and ends the thread; raises what nobody has been told yet."""
        try:
            self.join()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None

    def _submit(self, job: Callable[[], None]) -> None:
        self._thread = self._thread or ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._jobs.append(self._thread.submit(job))

    def _save_copy(self, copied: dict[str, Any], path: Place) -> None:
        self._failed = True
        self._save(copied, path)
        self._failed = False

    def _remove(self, path: Place) -> None:
        self._doomed.append(path)
        if not self._failed:
            self._remove_doomed()
