"""A set of shards being written: what is on disk already, so that a killed run goes on after its last whole shard."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ldm.data.making.dropped import FILE as DROPPED
from ldm.data.making.dropped import Dropped
from ldm.data.making.duplicates import SeenHashes
from ldm.data.making.picture import Prepared
from ldm.data.writer import IN_PROGRESS, ShardFile, claim, read_manifest, write_manifest
from ldm.files import write_bytes

HASHES = ".hashes"


class Place(NamedTuple):
    """Where in a source something lies: before this item of this part, both counted from 0."""

    part: int
    item: int


START = Place(0, 0)


@dataclass
class Progress:
    """What is on disk: the shards' entries in the manifest, and how far into the source they reach."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    columns: set[str] = field(default_factory=set)
    place: Place = START
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    dropped_bytes: int = 0
    num_samples: int = 0

    def summary(self) -> dict[str, Any]:
        """How many samples there are, what was dropped by reason, the most frequent first, and an example of each."""
        dropped = dict(sorted(self.dropped.items(), key=lambda pair: (-pair[1], pair[0])))
        return {
            "train": self.num_samples,
            "dropped": dropped,
            "examples": {name: self.examples[name] for name in dropped},
        }


class Journal:
    """Writes shards one after the other and keeps, in a hidden file, a line for each that is whole.

    A line says everything that the next shard depends on, so that a run that was killed, at whatever point, writes the
    same bytes as one that was not.
    """

    def __init__(
        self, folder: Path, identity: str, *, samples_per_shard: int, hash_bytes: int = 0, distance: int = 0
    ) -> None:
        """Go on with what the folder holds where it was begun with the same identity, else begin anew.

        Raises ValueError where shards lie that nobody here wrote.
        """
        self.folder, self.identity, self.samples_per_shard = folder, identity, samples_per_shard
        self._shard: ShardFile | None = None
        self.progress = _read(folder, identity, hash_bytes=hash_bytes)
        if not self.progress.shards:
            self._begin()
        self._reached = self.progress.place
        for path in folder.glob(".*.tmp"):
            path.unlink()
        count = self.progress.num_samples
        self._seen = SeenHashes(folder / HASHES, num_bytes=hash_bytes, distance=distance, count=count)
        self._dropped = (folder / DROPPED).open("ab")
        self._dropped.truncate(self.progress.dropped_bytes)
        self._dropped.seek(0, os.SEEK_END)
        self._lines = (folder / IN_PROGRESS).open("ab")

    @property
    def num_samples(self) -> int:
        """The samples written so far."""
        return self.progress.num_samples + (self._shard.num_samples if self._shard else 0)

    def reach(self, place: Place) -> None:
        """Note how far into the source what is taken or dropped from here on reaches."""
        self._reached = place

    def take(self, prepared: Prepared) -> Dropped | None:
        """Write a sample, unless it is like one written before: then return what is dropped."""
        number = self._seen.find(prepared.hash)
        if number is not None:
            shard, row = divmod(number, self.samples_per_shard)
            detail = f"like {shard:05d}{row:04d}"
            return Dropped(prepared.source, "duplicate", detail)
        if self._shard is None:
            self._shard = ShardFile(self.folder, len(self.progress.shards))
        self._shard.add(prepared.sample)
        self._seen.add(prepared.hash)
        if self._shard.num_samples == self.samples_per_shard:
            self._close_shard()
        return None

    def drop(self, dropped: Dropped) -> None:
        """Note what is left out."""
        row = {"source": dropped.source, "reason": dropped.reason, "detail": dropped.detail}
        self._dropped.write(json.dumps(row).encode() + b"\n")
        self.progress.dropped[dropped.reason] = self.progress.dropped.get(dropped.reason, 0) + 1
        self.progress.examples.setdefault(dropped.reason, f"{dropped.source}: {dropped.detail}")

    def finish(self) -> dict[str, Any]:
        """Write the last shard and the manifest, and return the summary; raises ValueError where there is no shard."""
        if self._shard is not None:
            self._close_shard()
        summary = self.progress.summary()
        if not self.progress.shards:
            told = ", ".join(f"{count} {reason}" for reason, count in summary["dropped"].items()) or "no picture at all"
            example = next(iter(summary["examples"].values()), "")
            raise ValueError(f"source: got nothing to write ({told}), expected a picture at least; {example}")
        self._sync(self._dropped)
        facts = {"identity": self.identity, "dropped": summary["dropped"], "examples": summary["examples"]}
        write_manifest(self.folder, self.progress.shards, columns=self.progress.columns, facts=facts)
        (self.folder / HASHES).unlink()
        return summary

    def close(self) -> None:
        """Close every file; a shard that was begun is left out, as by a kill."""
        if self._shard is not None:
            self._shard.abandon()
        self._seen.close()
        self._dropped.close()
        self._lines.close()

    def _begin(self) -> None:
        claim(self.folder)
        for name in (DROPPED, HASHES):
            (self.folder / name).unlink(missing_ok=True)
        self.progress = Progress()
        write_bytes(self.folder / IN_PROGRESS, json.dumps({"identity": self.identity}).encode() + b"\n")

    def _close_shard(self) -> None:
        """Put the shard, then what was dropped and the hashes, and then the line that counts on them on disk."""
        assert self._shard is not None
        progress, shard, self._shard = self.progress, self._shard, None
        self._sync(self._dropped)
        self._seen.flush()
        progress.shards.append(shard.close())
        progress.num_samples += shard.num_samples
        progress.columns |= shard.columns
        progress.place, progress.dropped_bytes = self._reached, self._dropped.tell()
        line = {
            "shard": progress.shards[-1],
            "columns": sorted(shard.columns),
            "place": progress.place,
            "dropped": progress.dropped,
            "examples": progress.examples,
            "dropped_bytes": progress.dropped_bytes,
        }
        self._lines.write(json.dumps(line).encode() + b"\n")
        self._sync(self._lines)

    @staticmethod
    def _sync(stream: Any) -> None:
        stream.flush()
        os.fsync(stream.fileno())


def finished_summary(folder: Path, identity: str) -> dict[str, Any] | None:
    """Return the summary of a whole set that was written with this identity, else None."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("identity") != identity or (folder / IN_PROGRESS).exists():
        return None
    (folder / HASHES).unlink(missing_ok=True)  # of a run that was killed in its very last step
    return {"train": manifest["num_samples"], "dropped": manifest["dropped"], "examples": manifest["examples"]}


def _read(folder: Path, identity: str, *, hash_bytes: int) -> Progress:
    """Return how far a set was written, as far as its files bear out what the lines say; nothing for another set."""
    progress = Progress()
    lines = list(_lines(folder / IN_PROGRESS))
    if not lines or lines[0].get("identity") != identity:
        return progress
    sizes = [path.stat().st_size if path.is_file() else 0 for path in (folder / DROPPED, folder / HASHES)]
    for line in lines[1:]:
        shard = folder / line["shard"]["name"]
        hashes = (progress.num_samples + line["shard"]["num_samples"]) * hash_bytes
        whole = shard.is_file() and shard.stat().st_size == line["shard"]["bytes"]
        if not whole or sizes[0] < line["dropped_bytes"] or sizes[1] < hashes:
            break
        progress.shards.append(line["shard"])
        progress.num_samples += line["shard"]["num_samples"]
        progress.columns.update(line["columns"])
        progress.place, progress.dropped_bytes = Place(*line["place"]), line["dropped_bytes"]
        progress.dropped, progress.examples = line["dropped"], line["examples"]
    return progress


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a file, cutting off a last one that a kill left in part."""
    if not path.is_file():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
    for line in content[:end].splitlines():
        yield json.loads(line)
