"""`ldm data index`: where everything in each shard lies, kept beside it, and what each folder of shards holds."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ldm.data.faults import Fault, header_faults
from ldm.data.index_file import index_path, read_index, save_index, stamp_of
from ldm.data.parallel import map_in_order
from ldm.data.readable import open_whole_samples
from ldm.data.shards import resolve_shards
from ldm.files import write_bytes

# Not manifest.json, by which `ldm shard` knows shards that it may write over.
CONTENTS = "shards.json"
# Bad samples are counted without end and listed up to here, for each shard.
MAX_LISTED = 100


@dataclass(frozen=True)
class ShardEntry:
    """One shard in shards.json; `bad` are faults that its headers show, `is_usable` says whether it can be read.

    Of one that was cut off, what lies before the cut can be: `num_samples` counts that, and no index is kept of it.
    """

    name: str
    is_usable: bool
    num_samples: int
    bytes: int
    modified: int
    sha256: str | None
    first_key: str | None
    last_key: str | None
    suffixes: list[str]
    num_bad: int
    bad: list[dict[str, str]]


def index_shards(
    shards: str | os.PathLike[str] | Sequence[str],
    *,
    sha256: bool = True,
    force: bool = False,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write an index beside each shard, and a shards.json into each of their folders; return the sums.

    Args:
        sha256: also read each shard whole, and note its hash; without it only headers are read.
        force: do again what is there; otherwise a shard that has not changed is left alone.
        progress: is told shards done and in all.

    Raises FileNotFoundError or ValueError where no shards are named, and OSError where nothing can be written.
    """
    paths = resolve_shards(shards)
    known = {} if force else _known_entries(paths)
    look = partial(index_one, known=known, sha256=sha256)
    entries: dict[Path, ShardEntry] = {}
    for path, entry in zip(paths, map_in_order(look, paths, workers=workers), strict=True):
        entries[path] = entry
        progress(len(entries), len(paths))
    for folder in sorted({path.parent for path in paths}):
        _write_contents(folder, {path.name: entry for path, entry in entries.items() if path.parent == folder})
    unusable = [str(path) for path, entry in entries.items() if not entry.is_usable]
    cut_off = [str(path) for path, entry in entries.items() if entry.is_usable and _is_cut_off(entry)]
    return _sums(entries.values()) | {"unusable": unusable, "cut_off": cut_off}


def index_one(path: Path, *, known: dict[Path, ShardEntry], sha256: bool) -> ShardEntry:
    """Write the index of one shard and return its entry; what is known of the very same bytes is not done again."""
    stamp = stamp_of(path)
    entry = known.get(path)
    current = entry is not None and (entry.bytes, entry.modified) == stamp and not (sha256 and entry.sha256 is None)
    if entry is not None and current:
        keeps_index = entry.is_usable and not _is_cut_off(entry)
        if not keeps_index or read_index(path) is not None:
            return entry
    index, faults = header_faults(path)
    if index is not None:
        save_index(index, stamp=stamp)
    else:
        index_path(path).unlink(missing_ok=True)
        with suppress(ValueError):
            index, _ = open_whole_samples(path)
    return ShardEntry(
        name=path.name,
        is_usable=index is not None,
        num_samples=len(index) if index is not None else 0,
        bytes=stamp[0],
        modified=stamp[1],
        sha256=_sha256(path) if sha256 else None,
        first_key=min(index.keys, default=None) if index is not None else None,
        last_key=max(index.keys, default=None) if index is not None else None,
        suffixes=list(index.suffixes) if index is not None else [],
        num_bad=len(faults),
        bad=[_described(fault) for fault in faults[:MAX_LISTED]],
    )


def read_contents(folder: str | os.PathLike[str]) -> dict[str, ShardEntry]:
    """Return what shards.json says of a folder's shards, by name; nothing where there is none that can be read."""
    path = Path(folder) / CONTENTS
    if not path.is_file():
        return {}
    try:
        return {row["name"]: ShardEntry(**row) for row in json.loads(path.read_bytes())["shards"]}
    except (ValueError, KeyError, TypeError):
        return {}  # of another version, or broken: it is made anew


def _known_entries(paths: Iterable[Path]) -> dict[Path, ShardEntry]:
    return {
        folder / name: entry
        for folder in {path.parent for path in paths}
        for name, entry in read_contents(folder).items()
    }


def _write_contents(folder: Path, new: dict[str, ShardEntry]) -> None:
    """Write shards.json, with the entries of shards that are still there and were not looked at this time."""
    old = {name: entry for name, entry in read_contents(folder).items() if (folder / name).is_file()}
    entries = dict(sorted((old | new).items()))
    content = {**_sums(entries.values()), "shards": [asdict(entry) for entry in entries.values()]}
    write_bytes(folder / CONTENTS, json.dumps(content, indent=1).encode())


def _sums(entries: Iterable[ShardEntry]) -> dict[str, Any]:
    listed = list(entries)
    return {
        "num_shards": len(listed),
        "num_samples": sum(entry.num_samples for entry in listed),
        "bytes": sum(entry.bytes for entry in listed),
        "num_bad": sum(entry.num_bad for entry in listed),
    }


def _is_cut_off(entry: ShardEntry) -> bool:
    return any(fault["kind"] == "truncated_tar" for fault in entry.bad)


def _described(fault: Fault) -> dict[str, str]:
    return {"key": fault.key, "kind": fault.kind, "reason": fault.reason}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
