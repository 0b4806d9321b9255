"""Fetch one file through fsspec: in one piece or not at all, within a time, at a least rate, and as it should be."""

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ldm.data.decoding import UnreachableError

CHUNK = 2**20
# The packages that fsspec needs for a scheme, which the extra "remote" installs.
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}


@dataclass(frozen=True)
class Patience:
    """How long to wait for a remote file.

    `timeout` is the most seconds for one attempt, `min_rate` the least bytes a second over `stall` seconds,
    `attempts` how often to try, `backoff` the seconds before the second attempt, doubled before each that follows.
    """

    timeout: float = 1800.0
    min_rate: float = 10_000.0
    stall: float = 30.0
    attempts: int = 5
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if self.timeout <= 0 or self.stall <= 0 or self.attempts < 1 or self.min_rate < 0 or self.backoff < 0:
            raise ValueError(f"data.remote.patience: got {self}, expected positive seconds and one attempt at least")


@dataclass
class _Transfer:
    """One attempt, on a thread of its own that is left behind where its server says nothing any more."""

    url: str
    out: Path
    limit: int | None
    done: int = 0
    size: int | None = None
    sha256: str = ""
    error: BaseException | None = None
    given_up: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    finished: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        try:
            self._copy()
        except BaseException as error:  # told to the thread that waits
            self.error = error
        finally:
            self.finished.set()

    def _copy(self) -> None:
        filesystem, path = open_filesystem(self.url)
        digest = hashlib.sha256()
        self.size = filesystem.info(path).get("size")
        self.out.touch()  # it may be there already, at its full size, which keeps the room for it
        with filesystem.open(path, "rb", block_size=CHUNK) as source, self.out.open("r+b") as target:
            while (chunk := source.read(CHUNK)) and self._store(chunk, target):
                digest.update(chunk)
            self._store(b"", target, is_last=True)
        if self.size is not None and self.done != self.size:
            raise OSError(f"got {self.done} of {self.size} bytes")
        self.sha256 = digest.hexdigest()

    def _store(self, chunk: bytes, target: IO[bytes], *, is_last: bool = False) -> bool:
        """Write a part, unless a later attempt writes the file by now."""
        with self.lock:
            if self.given_up:
                raise OSError("given up")
            self.done += len(chunk)
            if self.limit is not None and self.done > self.limit:
                raise OSError(f"got more than {self.limit} bytes")
            target.write(chunk)
            if is_last:
                target.truncate()
        return True

    def give_up(self) -> None:
        with self.lock:
            self.given_up = True


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL and the path in it; raises ValueError where a package is missing."""
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    try:
        filesystem, path = url_to_fs(url)
    except ImportError as error:
        scheme = url.partition("://")[0]
        package = PACKAGES.get(scheme, scheme)
        raise ValueError(f"shards: got {url}, which needs the package {package}: pip install 'ldm[remote]'") from error
    return filesystem, path


def matching(pattern: str) -> list[str]:
    """Return the URLs that a pattern with asterisks names, sorted.

    Raises PermissionError where they may not be listed, UnreachableError for whatever else is wrong.
    """
    filesystem, path = open_filesystem(pattern)
    try:
        return [filesystem.unstrip_protocol(name) for name in sorted(filesystem.glob(path))]
    except FileNotFoundError:
        return []
    except Exception as error:  # the data's edge: every file system has errors of its own
        if _is_forbidden(error):
            raise PermissionError(f"{pattern}: got {error}, expected files that may be listed") from error
        raise UnreachableError(
            f"{pattern}: {type(error).__name__}: {error}; expected files that can be listed; name them one by one, as "
            "in {00000..00099}.tar"
        ) from error


def download(
    url: str,
    out: Path,
    *,
    patience: Patience,
    check: Callable[[int, str], str | None] = lambda size, sha256: None,
    limit: int | None = None,
) -> tuple[int, str]:
    """Fetch a URL into `out` and return its size in bytes and its sha256.

    `check` says of a size and a hash what is wrong with them, if anything. What is wrong is fetched again. Raises
    UnreachableError after the last attempt, and at once FileNotFoundError or PermissionError for what is not to be had.
    """
    reasons: list[str] = []
    for attempt in range(patience.attempts):
        if attempt:
            time.sleep(patience.backoff * 2 ** (attempt - 1))
        transfer = _Transfer(url, out, limit)
        reason = _attempt(transfer, patience)
        reason = reason or check(transfer.done, transfer.sha256)
        if reason is None:
            return transfer.done, transfer.sha256
        reasons.append(reason)
    tried = ", then ".join(dict.fromkeys(reasons))
    raise UnreachableError(
        f"{url}: {tried}, in {patience.attempts} attempts; expected the whole file; look at the server, or copy the "
        "shards to this machine"
    )


def _attempt(transfer: _Transfer, patience: Patience) -> str | None:
    """Return why an attempt failed, or None; raises FileNotFoundError for a file that is not there."""
    threading.Thread(target=transfer.run, daemon=True).start()
    started = looked = time.monotonic()
    before = 0
    while not transfer.finished.wait(min(0.05, patience.stall / 4)):
        now = time.monotonic()
        if now - started > patience.timeout:
            transfer.give_up()
            return f"got {transfer.done} bytes in {patience.timeout:g} s"
        if now - looked > patience.stall:
            if transfer.done - before < patience.min_rate * patience.stall:
                transfer.give_up()
                return f"got {transfer.done - before} bytes in {patience.stall:g} s"
            looked, before = now, transfer.done
    if isinstance(transfer.error, ValueError):
        raise transfer.error
    if isinstance(transfer.error, FileNotFoundError):
        raise FileNotFoundError(f"{transfer.url}: got no such file, expected one") from transfer.error
    if transfer.error is not None and _is_forbidden(transfer.error):
        raise PermissionError(f"{transfer.url}: got {transfer.error}, expected a file that may be read")
    return f"{type(transfer.error).__name__}: {transfer.error}" if transfer.error else None


def _is_forbidden(error: BaseException) -> bool:
    """Say whether trying again is of no use; aiohttp and botocore, whose classes need not be there, have their own."""
    return (
        isinstance(error, PermissionError)
        or getattr(error, "status", None) in (401, 403)
        or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")
    )
