"""Which samples of each shard a filter kept: written beside the shards' numbers, honoured by the reader."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.expressions import Verdict
from ldm.data.filters import Filter
from ldm.data.index_file import open_index
from ldm.data.parallel import map_in_order
from ldm.data.rows import Unreadable, check_metadata, shard_rows
from ldm.data.shards import ShardIndex, ShardReader
from ldm.files import write_bytes

# The file that is written last, and that a reader opens first.
KEPT = "kept.json"
KEYS_NAME = re.compile(r"-[0-9a-f]{16}\.json$")
# Unreadable samples are counted without end and listed up to here.
MAX_LISTED = 100


@dataclass
class Survival:
    """What a filter did to some samples.

    `failed` and `unknown` count, for each condition, the samples for which it was false and neither. Samples without
    readable metadata are never kept; `unreadable` says of the first of them, by shard and key, why.
    """

    num_samples: int = 0
    kept: int = 0
    failed: list[int] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)
    num_unreadable: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)

    def add(self, other: "Survival") -> None:
        """Count another part's samples too."""
        self.num_samples += other.num_samples
        self.kept += other.kept
        self.failed = _sums(self.failed, other.failed)
        self.unknown = _sums(self.unknown, other.unknown)
        self.num_unreadable += other.num_unreadable
        self.unreadable = dict(islice({**self.unreadable, **other.unreadable}.items(), MAX_LISTED))

    def add_row(self, verdicts: Sequence[Verdict], *, kept: bool) -> None:
        """Count a sample with these verdicts."""
        self.failed = _sums(self.failed, [verdict is False for verdict in verdicts])
        self.unknown = _sums(self.unknown, [verdict is None for verdict in verdicts])
        self.kept += kept

    def add_unreadable(self, name: str, reason: str) -> None:
        """Count a sample without readable metadata."""
        self.num_unreadable += 1
        if len(self.unreadable) < MAX_LISTED:
            self.unreadable[name] = reason


@dataclass(frozen=True)
class ShardKept:
    """The samples that a filter kept of one shard, and the counts."""

    path: Path
    digest: str
    keys: list[str]
    survival: Survival


def judge_shard(path: Path, *, chosen: Filter, metadata: str = "json") -> ShardKept:
    """Judge every sample of a shard.

    Raises ValueError, naming shard and key, for a missing column, a value of the wrong type or an undecided null.
    """
    index, reader = open_index(path), ShardReader()
    survival, keys = Survival(len(index)), []
    for key, row in zip(index.keys, shard_rows(index, reader, metadata=metadata), strict=True):
        if isinstance(row, Unreadable):
            survival.add_unreadable(f"{path}: {key}", row.reason)
            continue
        try:
            verdicts = chosen.verdicts(row)
            kept = chosen.decide(verdicts, row)
        except ValueError as error:
            raise ValueError(f"{path}: {key}: {error}") from error
        survival.add_row(verdicts, kept=kept)
        if kept:
            keys.append(key)
    reader.close()
    return ShardKept(path, index.digest, keys, survival)


def judge_shards(
    paths: Sequence[Path], *, chosen: Filter, metadata: str = "json", workers: int = 0
) -> Iterator[ShardKept]:
    """Judge shard after shard, in order; raises ValueError as `judge_shard` does."""
    check_metadata(metadata)
    return map_in_order(partial(judge_shard, chosen=chosen, metadata=metadata), paths, workers=workers)


class KeptWriter:
    """Writes which samples were kept into a folder: a file of keys for each shard and, last of all, kept.json."""

    def __init__(self, folder: str | os.PathLike[str], chosen: Filter) -> None:
        """Raises ValueError for a folder that holds something else."""
        self.folder = Path(folder)
        self.chosen = chosen
        self.survival = Survival()
        self.shards: list[dict[str, Any]] = []
        self._digests: set[str] = set()
        claim(self.folder, mark=KEPT)
        for path in self.folder.iterdir():
            if KEYS_NAME.search(path.name):
                path.unlink()

    def add(self, kept: ShardKept) -> None:
        """Write one shard's keys; raises ValueError for a shard with the samples of another."""
        if kept.digest in self._digests:
            raise ValueError(f"shards: got {kept.path}, which holds the samples of another shard, expected each once")
        self._digests.add(kept.digest)
        content = json.dumps(kept.keys, indent=0).encode()
        name = f"{kept.path.stem}-{kept.digest}.json"
        write_bytes(self.folder / name, content)
        self.survival.add(kept.survival)
        self.shards.append(
            {
                "name": kept.path.name,
                "digest": kept.digest,
                "num_samples": kept.survival.num_samples,
                "kept": kept.survival.kept,
                "keys": name,
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )

    def finish(self) -> dict[str, Any]:
        """Write kept.json, which makes the folder valid, and return it."""
        summary = {"filter": self.chosen.described(), **summarize(self.survival), "shards": self.shards}
        write_bytes(self.folder / KEPT, json.dumps(summary, indent=1).encode())
        release(self.folder, mark=KEPT)
        return summary


class KeptSamples:
    """The samples that `ldm data filter` kept, by shard; `sha256` says which choice it is."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Raises FileNotFoundError where there is no finished result of a filter, ValueError for a broken one."""
        self.folder = Path(folder)
        path = self.folder / KEPT
        if not path.is_file():
            raise FileNotFoundError(
                f"data.filter: got {self.folder}, where there is no {KEPT}, expected the out=... of `ldm data filter`"
            )
        try:
            content = path.read_bytes()
            self.sha256 = hashlib.sha256(content).hexdigest()
            entries = json.loads(content)["shards"]
            self._entries = {entry["digest"]: entry for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"data.filter: got a broken {path} ({error}); run `ldm data filter` again") from error

    def select(self, index: ShardIndex) -> ShardIndex:
        """Return the index of the samples that were kept, in the shard's order.

        Raises ValueError for a shard that was not filtered, has changed since, or whose keys are damaged.
        """
        entry = self._entries.get(index.digest)
        if entry is None:
            raise ValueError(
                f"data.filter: got {index.path}, which {self.folder / KEPT} does not know or which has changed since; "
                "run `ldm data filter` again"
            )
        path = self.folder / Path(entry["keys"]).name
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise ValueError(f"{path}: got other bytes than {KEPT} says; filter again")
        kept = set(json.loads(content))
        rows = [row for row, key in enumerate(index.keys) if key in kept]
        if len(rows) != len(kept):
            raise ValueError(f"{path}: got keys that {index.path} lacks; filter again")
        return index.select(np.array(rows, dtype=np.int64))


def summarize(survival: Survival) -> dict[str, Any]:
    """Return the counts as json can hold them."""
    return asdict(survival)


def claim(folder: Path, *, mark: str) -> None:
    """Make the folder ours and without the last result; raises ValueError for one with files and without `mark`.

    A folder in which a killed run left its part has the mark's own sign, `.writing-<mark>`.
    """
    sign = folder / f".writing-{mark}"
    if folder.exists() and any(folder.iterdir()) and not (sign.exists() or (folder / mark).exists()):
        raise ValueError(f"out: got {folder}, which holds files of others, expected a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    sign.touch()
    (folder / mark).unlink(missing_ok=True)


def release(folder: Path, *, mark: str) -> None:
    """Take away the sign that a folder is being written."""
    (folder / f".writing-{mark}").unlink()


def _sums(first: Sequence[int], second: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip_longest(first, second, fillvalue=0)]
