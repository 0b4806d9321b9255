"""New shards that hold the kept samples alone."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ldm.data.filters import Filter
from ldm.data.index_file import open_index
from ldm.data.kept import ShardKept, Survival, claim, release, summarize
from ldm.data.shards import ShardIndex, ShardReader, check_size
from ldm.data.writer import IN_PROGRESS, MANIFEST
from ldm.files import replacing, write_bytes

# The file that says what was asked for and what it did; it also marks a folder that may be written anew.
FILTERED = "filter.json"


class CopyWriter:
    """Writes one new shard for each that keeps a sample, `00000.tar` on, and manifest.json last of all.

    The members that training reads are copied byte for byte under their keys; others are left out. The bytes of the
    new shards depend on the old ones and the filter alone.
    """

    def __init__(self, folder: str | os.PathLike[str], chosen: Filter) -> None:
        """Raises ValueError for a folder that holds something else."""
        self.folder = Path(folder)
        self.chosen = chosen
        self.survival = Survival()
        self.shards: list[dict[str, Any]] = []
        claim(self.folder, mark=FILTERED)
        (self.folder / IN_PROGRESS).touch()  # which keeps training from reading a part
        for path in [*self.folder.glob("*.tar"), *self.folder.glob(".*.tmp"), self.folder / MANIFEST]:
            path.unlink(missing_ok=True)

    def add(self, kept: ShardKept) -> None:
        """Copy one shard's kept samples; raises ValueError for a member that is too large to be read."""
        self.survival.add(kept.survival)
        if not kept.keys:
            return
        path = self.folder / f"{len(self.shards):05d}.tar"
        sha256 = _copy(kept, path)
        entry = {"name": path.name, "num_samples": len(kept.keys), "bytes": path.stat().st_size, "sha256": sha256}
        self.shards.append({**entry, "source": kept.path.name})

    def finish(self) -> dict[str, Any]:
        """Write filter.json and manifest.json, which make the folder valid, and return the former.

        Raises ValueError where no sample was kept.
        """
        if not self.shards:
            raise ValueError(f"filter.where: got {self.chosen.texts}, which keeps no sample, expected one at least")
        manifest = {"num_samples": self.survival.kept, "shards": self.shards}
        summary = {"filter": self.chosen.described(), **summarize(self.survival)}
        write_bytes(self.folder / FILTERED, json.dumps(summary, indent=1).encode())
        write_bytes(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        (self.folder / IN_PROGRESS).unlink()
        release(self.folder, mark=FILTERED)
        return summary


def _copy(kept: ShardKept, path: Path) -> str:
    """Write the kept samples of a shard as another, in one step, and return its sha256."""
    from webdataset.writer import TarWriter  # which imports torch

    index, reader = open_index(kept.path), ShardReader()
    keys = set(kept.keys)
    with replacing(path) as temporary:
        # An open file, because of a path webdataset refuses to open any once a stream has made it careful.
        with (
            temporary.open("wb") as file,
            TarWriter(file, encoder=False, mtime=0, user="", group="", compress=False) as tar,
        ):
            for row, key in enumerate(index.keys):
                if key in keys:
                    tar.write({"__key__": key, **_members(index, row, reader)})
        with temporary.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    reader.close()
    return sha256


def _members(index: ShardIndex, row: int, reader: ShardReader) -> dict[str, bytes]:
    members = {}
    for suffix, (offset, size) in index.members(row).items():
        check_size(suffix, size)
        members[suffix] = reader.read(index.path, offset, size)
    return members
