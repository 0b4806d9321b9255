"""What img2dataset fetched: its output formats webdataset, files and parquet, as its version 1.47 writes them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from ldm.data.making.sources import Extent, Item, pyarrow_module
from ldm.data.making.table import read_rows
from ldm.data.shards import BLOCK, IMAGE_SUFFIXES, REGULAR, BrokenTarError, scan_entries, split_name

UNFINISHED = ("refuse", "skip", "keep")
# What a shard's number may be followed by.
_FILE = re.compile(r"(\d+)(\.tar|\.parquet|\.tfrecord|_stats\.json|)")
# Columns that tell of the fetching, and the size after resizing, which the new shards state themselves.
BOOKKEEPING = ("key", "status", "error_message", "width", "height")
SUCCESS = "success"
LOST = {"failed_to_download", "failed_to_resize"}


@dataclass(frozen=True)
class Img2dataset:
    """A folder that img2dataset wrote, by shards: `00000.tar`, or `00000/`, beside `00000.parquet`, or that alone.

    The caption is the sample's .txt, else its column `caption`, or TEXT in any case. The original size is that before
    img2dataset's own resizing. Pictures that it could not fetch are in its parquet, and count as dropped.

    Args:
        folder: its `output_folder`.
        shards: a pattern of shards' numbers, so that several machines can share the work: "0000*", "*[02468]".
        unfinished: what to do with shards without `_stats.json`, which img2dataset writes last: "refuse", "skip" or
            "keep", as for shards that were copied without.
        columns: the columns to keep, under these names, found in any case (aesthetic is also AESTHETIC_SCORE);
            None = all.
    """

    folder: str
    shards: str = "*"
    unfinished: str = "refuse"
    columns: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.unfinished not in UNFINISHED:
            raise ValueError(f"unfinished: got {self.unfinished!r}, expected one of {', '.join(UNFINISHED)}")

    def files(self) -> list[str]:
        """Return the tars, parquets and folders of all shards; raises ValueError where there is none."""
        return [str(Path(self.folder) / name) for part in self.parts() for name in self._names(part)]

    def parts(self) -> list[str]:
        """Return the shards' numbers, as img2dataset writes them; raises ValueError for one that is unfinished."""
        found = self._found
        numbers = sorted((name for name in found if fnmatch(name, self.shards)), key=int)
        if not numbers:
            raise ValueError(
                f"folder: got {self.folder} with shards={self.shards}, expected what img2dataset writes, as 00000.tar "
                "and 00000_stats.json; name its output_folder"
            )
        unfinished = [name for name in numbers if "_stats.json" not in found[name]]
        if unfinished and self.unfinished == "refuse":
            raise ValueError(
                f"unfinished: got {len(unfinished)} shards without _stats.json ({unfinished[0]} is the first), which "
                "img2dataset writes last; run it again to complete them, or set dataset.source.unfinished=skip"
            )
        return numbers

    def items(self, part: str) -> Iterator[Item]:
        """Yield the pictures of a shard, and what could not be fetched; raises ValueError for a TFRecord."""
        kinds = self._found[part]
        if "_stats.json" not in kinds and self.unfinished == "skip":
            yield Item(part, dropped=("unfinished_shard", "got no _stats.json, which img2dataset writes last"))
        elif ".tar" in kinds:
            yield from self._tar_items(part)
            yield from self._lost_items(part)
        elif "" in kinds:
            yield from self._file_items(part)
            yield from self._lost_items(part)
        elif ".parquet" in kinds and ".tfrecord" not in kinds:
            yield from self._parquet_items(part)
        else:
            raise ValueError(
                f"folder: got {self.folder}/{part} as {sorted(kinds)}, expected the output format webdataset, files or "
                "parquet; run img2dataset with --output_format webdataset"
            )

    @cached_property
    def _found(self) -> dict[str, set[str]]:
        """Return what there is of each shard, by its number: .tar, .parquet, _stats.json, "" for a folder."""
        found: dict[str, set[str]] = {}
        for path in sorted(Path(self.folder).iterdir()) if Path(self.folder).is_dir() else ():
            match = _FILE.fullmatch(path.name)
            if match and (match[2] or path.is_dir()):
                found.setdefault(match[1], set()).add(match[2])
        return found

    def _names(self, part: str) -> list[str]:
        return sorted(part + kind for kind in self._found[part])

    def _item(self, name: str, **found: Any) -> Item:
        keep = None if self.columns is None else tuple(self.columns)
        return Item(name, **found, keep=keep, left_out=BOOKKEEPING)

    def _tar_items(self, part: str) -> Iterator[Item]:
        path = Path(self.folder) / f"{part}.tar"
        rows: dict[str, dict[str, Extent]] = {}
        fault, cut = "", ""
        try:
            for kind, name, offset, size in scan_entries(path):
                if kind in REGULAR:
                    key, suffix = split_name(name)
                    rows.setdefault(key, {})[suffix] = Extent(str(path), offset, size)
            if not _has_end(path):
                fault, cut = "got a tar without its end, expected a whole one; copy it again", next(reversed(rows), "")
        except BrokenTarError as error:
            fault, cut = str(error).removeprefix(f"{path}: "), split_name(error.member)[0]
        rows.pop(cut, None)  # whose other members may lie beyond the end
        for key, members in rows.items():
            yield self._sample(key, members)
        if fault:
            yield Item(f"{part}.tar", dropped=("broken_shard", fault))

    def _file_items(self, part: str) -> Iterator[Item]:
        rows: dict[str, dict[str, Extent]] = {}
        for path in sorted((Path(self.folder) / part).iterdir()):
            rows.setdefault(path.stem, {})[path.suffix.removeprefix(".").lower()] = Extent(str(path))
        for key, members in rows.items():
            yield self._sample(key, members)

    def _sample(self, key: str, members: dict[str, Extent]) -> Item:
        image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
        return self._item(key, image=image, caption=members.get("txt"), columns=members.get("json", {}))

    def _parquet_items(self, part: str) -> Iterator[Item]:
        path = str(Path(self.folder) / f"{part}.parquet")
        names, rows = read_rows(path)
        suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in names), None)
        if suffix is None:
            raise ValueError(
                f"folder: got {path} without a column of pictures ({', '.join(IMAGE_SUFFIXES)}) and no {part}.tar or "
                f"{part}/ beside it; run img2dataset again"
            )
        for row in rows:
            image = row.pop(suffix)
            if row["status"] in LOST:
                yield _lost(row)
            else:
                yield self._item(str(row["key"]), image=image, columns=row)

    def _lost_items(self, part: str) -> Iterator[Item]:
        path = Path(self.folder) / f"{part}.parquet"
        if not path.is_file():
            return
        file = pyarrow_module("pyarrow.parquet", option="folder").ParquetFile(path)
        for batch in file.iter_batches(columns=["key", "status", "error_message"]):
            for row in batch.to_pylist():
                if row["status"] in LOST:
                    yield _lost(row)


def _has_end(path: Path) -> bool:
    """Say whether a tar ends with the two empty blocks that mark its end."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 2 * BLOCK))
        return not stream.read().strip(b"\0")


def _lost(row: dict[str, Any]) -> Item:
    return Item(str(row["key"]), dropped=(row["status"], str(row["error_message"])[:200]))
