"""Whole samples out of tar shards read front to back: files, copies of remote shards, and, where allowed, pipes."""

import os
import select
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, cast

import numpy as np

from ldm.data.decoding import MAX_BYTES, SUFFIXES, CorruptSampleError, UnreachableError
from ldm.data.faults import Fault
from ldm.data.readable import open_whole_samples
from ldm.data.shards import Opener, ShardIndex, ShardReader, split_name

PIPE = "pipe:"
# Told of every fault that is met on the way.
Note = Callable[[Fault], None]


def is_pipe(source: str) -> bool:
    """Say whether a source is a command for a shell."""
    return source.startswith(PIPE)


@dataclass(frozen=True)
class RawSample:
    """The members of one sample as they are stored, by suffix; it is read as a shard of its own."""

    shard: str
    key: str
    members: Mapping[str, bytes]

    @property
    def index(self) -> ShardIndex:
        """Say where the members lie in `content`."""
        sizes = np.array([[len(content) for content in self.members.values()]], dtype=np.int64)
        offsets = np.cumsum(sizes, axis=1) - sizes
        return ShardIndex(Path(self.shard), (self.key,), tuple(self.members), offsets, sizes)

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Return a member's bytes, as `ShardReader.read` does."""
        return b"".join(self.members.values())[offset : offset + size]


def file_samples(path: Path, url: str, *, remote: Opener | None, note: Note) -> Iterator[RawSample]:
    """Yield the samples of a shard on this machine, in order, up to where it is cut off, and note what is wrong."""
    reader = ShardReader(1, remote=remote)
    try:
        if remote is not None:
            reader.read(path, 0, 0)  # which fetches a remote one
        index, faults = open_whole_samples(path)
        for fault in faults:
            note(Fault(url, "", fault.kind, fault.reason))
        for row, key in enumerate(index.keys):
            members = index.members(row)
            if _is_too_large({suffix: size for suffix, (_, size) in members.items()}, url, key, note):
                continue
            yield RawSample(url, key, {suffix: reader.read(path, *place) for suffix, place in members.items()})
    except UnreachableError:
        raise
    except (ValueError, OSError) as error:
        kind = getattr(error, "kind", "unreadable")
        note(Fault(url, "", kind, str(error).removeprefix(f"{path}: ")))
    finally:
        reader.close()


def pipe_samples(url: str, *, stall: float, note: Note) -> Iterator[RawSample]:
    """Yield the whole samples of the tar that a shell command writes; what ends inside a sample loses that sample.

    Raises UnreachableError for a command that is silent for `stall` seconds, or fails.
    """
    command = url.removeprefix(PIPE)
    # In a session of its own, so that whatever the shell started ends with it.
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    done = False
    try:
        # Of a stream, tarfile asks for `read` alone.
        with tarfile.open(fileobj=cast(IO[bytes], _Patient(process.stdout, url, stall)), mode="r|") as tar:
            yield from _tar_samples(tar, url, note)
        done = True
    except tarfile.TarError as error:
        note(Fault(url, "", "truncated_tar", str(error)))
        done = True
    finally:
        process.stdout.close()
        if not done:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    if code:
        raise UnreachableError(f"{url}: got exit code {code}, expected 0; run the command by hand")


class _Patient:
    """The output of a command, which may not be silent for too long."""

    def __init__(self, stream: IO[bytes], url: str, stall: float) -> None:
        self._stream, self._url, self._stall = stream, url, stall

    def read(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size > 0:
            if not select.select([self._stream], [], [], self._stall)[0]:
                raise UnreachableError(f"{self._url}: got nothing for {self._stall:g} s, expected a tar")
            part = os.read(self._stream.fileno(), size)
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _tar_samples(tar: tarfile.TarFile, url: str, note: Note) -> Iterator[RawSample]:
    """Yield samples of members that lie together; a broken tar raises before the sample inside which it breaks."""

    def members() -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        for entry in tar:
            key, suffix = split_name(entry.name)
            if entry.isreg() and suffix in SUFFIXES:
                yield key, suffix, entry

    for key, group in groupby(members(), key=lambda member: member[0]):
        found: dict[str, bytes] = {}
        oversized = False
        for _, suffix, entry in group:
            oversized |= _is_too_large({suffix: entry.size}, url, key, note)
            content = b"" if oversized else _content(tar, entry)
            if suffix in found:
                note(Fault(url, key, "repeated_member", f"got .{suffix} twice"))
            found[suffix] = content
        if not oversized:
            yield RawSample(url, key, found)


def _content(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(entry)
    assert stream is not None  # it is a regular file
    content = stream.read()
    if len(content) != entry.size:
        raise tarfile.ReadError(f"got {len(content)} of {entry.size} bytes of {entry.name}")
    return content


def _is_too_large(sizes: Mapping[str, int], url: str, key: str, note: Note) -> bool:
    for suffix, size in sizes.items():
        if size > MAX_BYTES[suffix]:
            reason = f"got {size} bytes in .{suffix}, expected at most {MAX_BYTES[suffix]}"
            note(Fault(url, key, "oversized_member", reason))
            return True
    return False


def no_sample(url: str) -> CorruptSampleError:
    """Return what to raise for a source without a sample."""
    return CorruptSampleError(f"{url}: got no sample, expected one at least", kind="no_samples")
