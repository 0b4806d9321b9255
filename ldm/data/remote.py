"""Shards that are named by URL: kept in a folder of this machine, bounded, shared by all of its processes."""

import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from ldm.data.download import Patience, download, matching
from ldm.data.faults import Fault
from ldm.data.index_file import index_path, read_index, save_index
from ldm.data.shards import ShardIndex, resolve_shards
from ldm.files import write_bytes

SCHEMES = ("s3", "gs", "http", "https", "file", "memory")
# What describes the shards of a folder, with their hashes; `ldm shard` writes the first, `ldm data index` the other.
LISTS = ("manifest.json", "shards.json")
# Of an index or a list of shards, in bytes; a larger one is none.
MAX_LIST = 2**30
_COUNTER = itertools.count()


def is_url(text: str) -> bool:
    """Say whether a text names a remote shard and not a file of this machine."""
    return "://" in text


def names_urls(shards: str | os.PathLike[str] | Sequence[str]) -> bool:
    """Say whether any of the shards is named by URL."""
    return any(is_url(os.fspath(text)) for text in ([shards] if isinstance(shards, str | os.PathLike) else shards))


class ShardCache:
    """Copies of remote shards in a folder, at most so many gigabytes; the least recently used make room.

    A copy is whole or not there: it is fetched beside its place and moved there after its hash was compared with
    that of the manifest beside the remote shards, or, where there is none, with what was fetched the first time. A
    file that some process has open is never removed. One process fetches a shard while the others wait for it.
    Indices are kept for ever: `ldm data index` before an upload spares fetching every shard once to make them.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        gigabytes: float = 100.0,
        timeout: float = 1800.0,
        min_rate: float = 10_000.0,
        stall: float = 30.0,
        attempts: int = 5,
        backoff: float = 1.0,
    ) -> None:
        """For `timeout` to `backoff` see `ldm.data.download.Patience`. Raises ValueError for numbers out of range."""
        if gigabytes <= 0:
            raise ValueError(f"data.remote.gigabytes: got {gigabytes}, expected more than 0")
        self.folder = Path(folder).expanduser().absolute()
        self.max_bytes = int(gigabytes * 10**9)
        self.patience = Patience(timeout, min_rate, stall, attempts, backoff)
        self._stated: dict[Path, dict[str, dict[str, Any]]] = {}

    def owns(self, path: Path) -> bool:
        """Say whether a path is that of a copy."""
        return path.is_relative_to(self.folder)

    def locate(self, shards: str | os.PathLike[str] | Sequence[str]) -> list[Path]:
        """Return where the copies of the shards that are named are or will be; local shards as they are.

        Raises ValueError for a URL of an unknown kind and FileNotFoundError where nothing is found.
        """
        texts = [os.fspath(shards)] if isinstance(shards, str | os.PathLike) else [os.fspath(text) for text in shards]
        paths: list[Path] = []
        for pattern in (pattern for text in texts for pattern in braceexpand(text)):
            if is_url(pattern):
                paths += [self._place(url) for url in self._expand(pattern)]
            else:
                paths += [Path(pattern)] if self.owns(Path(pattern)) else resolve_shards(pattern)
        repeated = (
            next((path for path in paths if paths.count(path) > 1), None) if len(set(paths)) < len(paths) else None
        )
        if repeated is not None:
            raise ValueError(f"shards: got {self.url(repeated)} more than once, expected every shard once")
        return paths

    def url(self, path: Path) -> str:
        """Return what a path is the copy of."""
        return str(self._source(path)["url"]) if self.owns(path) else str(path)

    def open_index(self, path: Path) -> tuple[ShardIndex, list[Fault]]:
        """Return a shard's index, kept, beside the remote shard, or made of a copy, and the shard's faults.

        Raises ValueError for a shard that cannot be read and UnreachableError for one that cannot be fetched.
        """
        from ldm.data.readable import open_whole_samples

        if not self.owns(path):
            return open_whole_samples(path)
        size = self._entry(path).get("bytes") or self._source(path).get("size")
        kept = read_index(path, stamp=(size, 0)) if size else None
        if kept is None and size and self._fetch_index(path, size):
            kept = read_index(path, stamp=(size, 0))
        if kept is not None:
            return kept, []
        os.close(self.open(path))
        index, faults = open_whole_samples(path)
        if faults:
            return index, faults
        stamp = (self._source(path)["size"], 0)
        save_index(index, stamp=stamp)
        return read_index(path, stamp=stamp) or index, []

    def open(self, path: Path) -> int:
        """Return a descriptor of a shard, fetching it first where it has to be; while it is open, its copy stays."""
        if not self.owns(path):
            return os.open(path, os.O_RDONLY)
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self.fetch(path)
                continue
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink:
                os.utime(path)
                return descriptor
            os.close(descriptor)  # another process removed it meanwhile

    def fetch(self, path: Path, *, keep: Collection[Path] = ()) -> bool:
        """Make sure that a copy is there; returns False where only shards of `keep` could make room for it.

        Raises UnreachableError as `download` does, and ValueError where open shards fill the cache.
        """
        with held(path.with_name(f"{path.name}.lock")):
            if path.exists():
                return True
            for stale in path.parent.glob(f".{path.name}.*.part"):
                stale.unlink(missing_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}-{next(_COUNTER)}.part")
            stated = {"size": self._entry(path).get("bytes"), **self._source(path)}
            try:
                if not self._reserve(part, stated["size"] or 0, keep=keep):
                    return False
                size, sha256 = self._download(path, part)
                write_bytes(_source_path(path), json.dumps(stated | {"size": size, "sha256": sha256}).encode())
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        with held(self.folder / ".lock"):
            self._make_room(0, keep={path, *keep})
        return True

    def _download(self, path: Path, part: Path) -> tuple[int, str]:
        source, entry = self._source(path), self._entry(path)
        sha256 = entry.get("sha256") or source.get("sha256")
        size = entry.get("bytes") or source.get("size")

        def check(got: int, digest: str) -> str | None:
            if size is not None and got != size:
                return f"got {got} bytes where {size} are stated"
            return f"got sha256 {digest[:12]} where {sha256[:12]} is stated" if sha256 not in (None, digest) else None

        return download(source["url"], part, patience=self.patience, check=check, limit=size)

    def _reserve(self, part: Path, size: int, *, keep: Collection[Path]) -> bool:
        """Make room for a file and take it, by a file of that size without content."""
        with held(self.folder / ".lock"):
            if not self._make_room(size, keep=keep):
                if keep:
                    return False
                raise ValueError(
                    f"data.remote.gigabytes: got {self.max_bytes / 1e9:g} GB in {self.folder}, all of it in use, "
                    f"expected room for {size / 1e9:g} GB more; raise it, or lower data.block_size"
                )
            with part.open("wb") as stream:
                stream.truncate(size)
        return True

    def _make_room(self, size: int, *, keep: Collection[Path]) -> bool:
        """Remove shards that nobody has open, least recently used first, until `size` bytes fit."""
        found = []
        for path in self.folder.glob("*/*"):
            if path.suffix in (".tar", ".part"):
                with suppress(FileNotFoundError):  # a part that has taken its place since it was listed
                    found.append((path, path.stat()))
        total = sum(status.st_size for _, status in found)
        for path, status in sorted(found, key=lambda pair: pair[1].st_mtime_ns):
            if total + size <= self.max_bytes:
                break
            if path.suffix == ".tar" and path not in keep and _remove_unused(path):
                total -= status.st_size
        return total + size <= self.max_bytes

    def _place(self, url: str) -> Path:
        """Return where the copy of a URL belongs, and note there what it is a copy of."""
        parent, _, name = url.rpartition("/")
        folder = self.folder / hashlib.sha256(parent.encode()).hexdigest()[:16]
        path = folder / (name if name.endswith(".tar") else f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.tar")
        if folder not in self._stated:
            folder.mkdir(parents=True, exist_ok=True)
            self._stated[folder] = self._fetch_lists(parent, folder)
        if not _source_path(path).is_file() or self._has_changed(path):
            for stale in (path, index_path(path), *folder.glob(f"{path.stem}.sizes-*.npy")):
                stale.unlink(missing_ok=True)
            write_bytes(_source_path(path), json.dumps({"url": url}).encode())
        return path

    def _has_changed(self, path: Path) -> bool:
        """Say whether the list beside a remote shard states another one than was fetched."""
        entry, source = self._entry(path), self._source(path)
        pairs = ((entry.get("sha256"), source.get("sha256")), (entry.get("bytes"), source.get("size")))
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)

    def _expand(self, pattern: str) -> list[str]:
        """Return the URLs of shards that a URL, a pattern or a folder names."""
        scheme = pattern.partition("://")[0]
        if scheme not in SCHEMES:
            raise ValueError(f"shards: got {pattern}, expected a file or one of {', '.join(SCHEMES)}")
        if pattern.endswith(".tar") and "*" not in pattern:
            return [pattern]
        folder = pattern.rstrip("/")
        if "*" not in pattern and (listed := self._names(folder)):
            return [f"{folder}/{name}" for name in listed]
        found = matching(pattern if "*" in pattern else f"{folder}/*.tar")
        if not found:
            raise FileNotFoundError(f"shards: got {pattern}, where there is no tar file, expected shards")
        return found

    def _names(self, parent: str) -> list[str]:
        """Return the shards that the list beside them names."""
        folder = self.folder / hashlib.sha256(parent.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        self._stated[folder] = self._fetch_lists(parent, folder)
        return sorted(self._stated[folder])

    def _fetch_lists(self, parent: str, folder: Path) -> dict[str, dict[str, Any]]:
        """Return what the lists beside remote shards state of each; the manifest is kept beside the copies."""
        stated: dict[str, dict[str, Any]] = {}
        for name in LISTS:
            if not self._fetch_small(f"{parent}/{name}", folder / name):
                continue
            try:
                entries = {entry["name"]: entry for entry in json.loads((folder / name).read_bytes())["shards"]}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{parent}/{name}: got no list of shards ({error!r}), expected what `ldm shard` or `ldm data "
                    "index` writes; put it there again, or remove it"
                ) from error
            for shard, entry in entries.items():
                known = {key: value for key, value in entry.items() if value is not None}
                stated[shard] = stated.get(shard, {}) | known
        return stated

    def _fetch_index(self, path: Path, size: int) -> bool:
        """Take over the index beside a remote shard, where there is one of a shard of this size."""
        place = index_path(path)
        url = f"{self.url(path).removesuffix('.tar')}.index.safetensors"
        if not self._fetch_small(url, place):
            return False
        found = read_index(path, stamp=(size, _stamped(place)))
        place.unlink()
        if found is None:
            return False
        save_index(found, stamp=(size, 0))
        return True

    def _fetch_small(self, url: str, out: Path) -> bool:
        """Fetch a file that describes shards; returns False where there is none."""
        part = out.with_name(f".{out.name}.{os.getpid()}-{next(_COUNTER)}.small")
        try:
            download(url, part, patience=self.patience, limit=MAX_LIST)
            part.replace(out)
        except (FileNotFoundError, PermissionError):  # which a bucket that may not be listed says of what is not there
            out.unlink(missing_ok=True)
            return False
        finally:
            part.unlink(missing_ok=True)
        return True

    def _entry(self, path: Path) -> dict[str, Any]:
        return self._stated.get(path.parent, {}).get(path.name, {})

    def _source(self, path: Path) -> dict[str, Any]:
        source: dict[str, Any] = json.loads(_source_path(path).read_bytes())
        return source


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Hold a lock file against every other process and thread; the system lets go of it where a process dies."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_unused(path: Path) -> bool:
    """Remove a copy, unless some process has it open."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _source_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.source.json")


def _stamped(index: Path) -> int:
    """Return the time of modification that an index file was made at, 0 for one that cannot be read."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    with suppress(SafetensorError, OSError, KeyError, IndexError):
        return int(load_file(index)["stamp"][2])
    return 0
