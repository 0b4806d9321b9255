"""Lightning saves and loads checkpoints by the protocol of `checkpoint_files`."""

from __future__ import annotations

import errno
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning.plugins.io import CheckpointIO

from ldm.training.checkpoint_files import (
    Damaged,
    Place,
    StorageError,
    Writer,
    is_valid,
    local_path,
    quarantine,
    url_to_fs,
    verify,
    write,
)
from ldm.training.checkpoint_folders import check_space, in_words, remove
from ldm.training.checkpoint_parts import facts_of, num_bytes, parts_of, read

# Trying again does not help a full disk.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class AtomicCheckpointIO(CheckpointIO):
    """Saves before training goes on; a checkpoint is there whole and verified, or the one before it is.

    Removing is safe with any callback, Lightning's `ModelCheckpoint` included: a checkpoint goes once two other valid
    ones lie beside it, and not before.

    Args:
        attempts: how often a save is tried where the storage fails for a reason other than being full.
        wait_seconds: before the second attempt; twice as long before each further one.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, *, attempts: int = 3, wait_seconds: float = 1.0) -> None:
        if attempts < 1 or wait_seconds < 0:
            raise ValueError(f"got attempts={attempts}, wait_seconds={wait_seconds}; expected at least 1 and 0")
        self.attempts, self.wait_seconds = attempts, wait_seconds
        self._doomed: list[Place] = []
        self._seen: dict[str, object] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Place, storage_options: Any = None) -> None:
        """Writes the checkpoint folder `path`, here or at an address that fsspec knows.

        Raises:
            StorageError: it could not be written; earlier checkpoints are as they were.
            ValueError: the checkpoint holds what only running code could load.
        """
        refuse_options(storage_options)
        self._save(checkpoint, path)

    def load_checkpoint(
        self, path: Place, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint of this or of the former format after checking every byte; runs no code of it.

        Raises:
            FileNotFoundError: there is nothing.
            Damaged: it is not as it was written.
            ValueError: `weights_only=False`.
        """
        if weights_only is False:
            raise ValueError("weights_only: got False, expected True or None: ldm runs no code of a checkpoint")
        fs, root = url_to_fs(str(path))
        if fs.exists(root):
            try:
                verify(path)
            except Damaged as damage:
                raise Damaged(f"{path}: {damage}; resume from another checkpoint") from damage
        return read(path, map_location=map_location)

    def remove_checkpoint(self, path: Place) -> None:
        """Removes a checkpoint as soon as two other valid ones lie beside it."""
        self._doomed.append(path)
        self._remove_doomed()

    def poll(self) -> None:
        """Raises what went wrong with saving since the last call; here nothing can have."""

    def join(self) -> None:
        """Waits until everything is saved, and raises what went wrong; here everything is."""

    def _save(self, checkpoint: Mapping[str, Any], place: Place) -> None:
        parts, facts = parts_of(checkpoint), {**facts_of(checkpoint), "saved": time.time()}
        needed = num_bytes(checkpoint)
        # A tenth for the headers and the file system's own bookkeeping.
        check_space(place, needed + needed // 10)
        for attempt in range(1, self.attempts + 1):
            try:
                self._write_once(place, parts, facts)
                break
            except OSError as error:
                if attempt == self.attempts or error.errno in _FULL:
                    raise failure(place, error, needed) from error
                warnings.warn(f"{place}: {error}; trying again", stacklevel=2)
                time.sleep(self.wait_seconds * 2 ** (attempt - 1))
        self._remove_doomed()

    def _write_once(self, place: Place, parts: Mapping[str, Writer], facts: Mapping[str, Any]) -> None:
        with _errors_of_stores(place):
            write(place, parts, facts=facts)
        try:
            verify(place)
        except Damaged as damage:
            path = local_path(place)
            if path is not None:
                quarantine(path)
            raise OSError(errno.EIO, f"read back otherwise than written: {damage}") from damage
        self._seen[str(place)] = _fingerprint(place)

    def _remove_doomed(self) -> None:
        self._doomed = [place for place in self._doomed if not remove(place, valid=self._is_valid)]

    def _is_valid(self, place: Place) -> bool:
        """As `is_valid`, without reading again what this process has verified and nobody has touched since."""
        fingerprint = _fingerprint(place)
        if self._seen.get(str(place)) != fingerprint:
            if not is_valid(place):
                return False
            self._seen[str(place)] = fingerprint
        return True


@contextmanager
def _errors_of_stores(place: Place) -> Iterator[None]:
    """Makes an `OSError` of what a remote store raises: each has errors of its own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if local_path(place) is not None:
            raise
        raise OSError(errno.EIO, " ".join(f"{type(error).__name__}: {error}".split())) from error


def refuse_options(storage_options: Any) -> None:
    """Refuses options that nothing would read.

    Raises:
        TypeError: there are some.
    """
    if storage_options is not None:
        raise TypeError("storage_options: got some, expected none; configure fsspec itself for a remote store")


def _fingerprint(place: Place) -> object:
    """Sizes and times of a checkpoint's files, which change when anybody writes to it."""
    path = local_path(place)
    if path is None:
        fs, root = url_to_fs(str(place))
        return sorted((name, fs.size(name)) for name in fs.find(root))
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def failure(place: Place, error: Exception, needed: int) -> StorageError:
    """What to raise for a disk that refused a checkpoint of so many bytes."""
    reason = getattr(error, "strerror", None) or str(error)
    return StorageError(
        f"{Path(str(place)).name}: could not be saved to {str(place).rpartition('/')[0]} ({reason}; it needs "
        f"{in_words(needed)}). Earlier checkpoints are as they were: see to the storage and give the same command again"
    )
