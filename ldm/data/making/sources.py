"""What shards are made of: a source lists its pictures in an order of its own, without reading them."""

import datetime
import decimal
import glob
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ldm.data.rows import ColumnNames, MissingColumnError, pixels_stated

# Columns that the writer states itself; a source's own of these names are kept as source_<name>.
WRITTEN = ("key", "caption", "width", "height", "original_width", "original_height", "sha256", "status", "source_key")
# The size of a picture before it was ever resized, which the writer takes over.
SIZE = ("original_width", "original_height")
# Columns of a crop, which the shards state where they cut a picture.
CROP = ("crop_top", "crop_left", "target_height", "target_width")


@dataclass(frozen=True)
class Extent:
    """Bytes that lie in a file and are read only where they are needed: `size` of them from `offset` on; -1 = all."""

    path: str
    offset: int = 0
    size: int = -1

    def __len__(self) -> int:
        """The number of bytes; raises OSError where the file is not there."""
        return Path(self.path).stat().st_size if self.size < 0 else self.size

    def read(self) -> bytes:
        """Return the bytes; raises OSError where the file is not there or is shorter."""
        with Path(self.path).open("rb") as stream:
            stream.seek(self.offset)
            content = stream.read(self.size)
        if self.size >= 0 and len(content) != self.size:
            raise OSError(f"{self.path}: got {len(content)} bytes at {self.offset}, expected {self.size}")
        return content


@dataclass(frozen=True)
class Item:
    """One picture of a source, on its way into a shard.

    Args:
        name: what it is called in its source, the same wherever the source lies.
        image: its encoded bytes, or where they are; None where `dropped` says why there are none.
        caption: its text or where that lies; None looks for one in `columns`.
        columns: what else is known of it, or where that lies, a json object.
        caption_column: the column that holds the caption where `caption` is None, under this name or a usual alias.
        keep: the columns to keep, each under the name given here; None keeps all.
        own: columns of the shards themselves, that no choice leaves out.
        left_out: columns that only tell how the source was made.
        without_caption: what to say where there is no caption.
        dropped: (reason, detail) of a picture that the source already knows to be missing.
    """

    name: str
    image: bytes | Extent | None = None
    caption: str | Extent | None = None
    columns: Mapping[str, Any] | Extent = field(default_factory=dict)
    caption_column: str = "caption"
    keep: tuple[str, ...] | None = None
    own: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    without_caption: str = "got no caption, expected one; see dataset.captions=optional"
    dropped: tuple[str, str] | None = None


class Source(Protocol):
    """A set of pictures in parts, each with its items in an order that the files alone decide.

    A frozen dataclass: with the files' stamps, its `repr` tells whether a set that was begun is of the same source.
    """

    def files(self) -> Sequence[str]:
        """Return the files that the source consists of."""
        ...

    def parts(self) -> Sequence[str]:
        """Return the names of the parts, in order; going on with a set skips whole parts unread."""
        ...

    def items(self, part: str) -> Iterator[Item]:
        """Yield the items of a part, always the same."""
        ...


def stamp(path: str | os.PathLike[str]) -> str:
    """Return a file's size and time of change, which tell a changed file from the same one."""
    status = Path(path).stat()
    return f"{status.st_size}@{status.st_mtime_ns}"


def find_files(pattern: str | Sequence[str], *, suffixes: Sequence[str], option: str) -> list[str]:
    """Return the files that a path, a folder, a glob, a brace expression, or a list of these names, by name.

    Raises ValueError where there is none, or one has another suffix.
    """
    from braceexpand import braceexpand

    patterns = [pattern] if isinstance(pattern, str | os.PathLike) else pattern
    paths: list[str] = []
    for text in (one for each in patterns for one in braceexpand(os.fspath(each))):
        if Path(text).is_dir():
            paths += sorted(str(path) for path in Path(text).iterdir() if path.name.endswith(tuple(suffixes)))
        else:
            paths += sorted(glob.glob(text)) if glob.has_magic(text) else [text] * Path(text).is_file()  # noqa: PTH207
    wrong = [path for path in paths if not path.endswith(tuple(suffixes))]
    if not paths or wrong:
        got = wrong[0] if wrong else pattern
        raise ValueError(f"{option}: got {got}, expected files that are there ({', '.join(suffixes)})")
    return paths


def find_column(name: str, available: Iterable[str], *, option: str, where: str) -> str:
    """Return which of the names a column has, in any case; raises ValueError where none does."""
    try:
        return ColumnNames().find(name, list(available))
    except MissingColumnError as error:
        raise ValueError(f"{option}: got {where} without it: {error}; set dataset.source.{option}=NAME") from error


def pyarrow_module(name: str, *, option: str) -> Any:
    """Import a module of pyarrow; raises ValueError where it is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{option}: got a file that the package pyarrow reads, which is not installed; "
            "install it with: pip install 'ldm[parquet]'"
        ) from error


def parse_object(content: bytes) -> dict[str, Any]:
    """Return a json object; raises ValueError for anything else, UnicodeDecodeError for what is not UTF-8."""
    row = json.loads(content.decode())
    if not isinstance(row, dict):
        raise ValueError(f"got a json {type(row).__name__}, expected an object")
    return row


def kept_columns(item: Item, row: Mapping[str, Any], *, caption: str) -> dict[str, Any]:
    """Return what the json of a sample holds besides what the writer states: plain values under free names.

    Raises ValueError where a column that was asked for is not there.
    """
    if item.keep is None:
        told = ("caption", caption)  # which the writer states
        known = {name for name in SIZE if pixels_stated(row.get(name))}
        names = [name for name in row if name not in known and (name, str(row[name]).strip()) != told]
        chosen = {name: row[name] for name in names if name not in item.left_out}
    else:
        found = {name: find_column(name, row, option="columns", where=item.name) for name in item.keep}
        chosen = {name: row[found[name]] for name in found}
    taken = (*WRITTEN, *CROP, *item.own)
    renamed = {f"source_{name}" if name in taken else name: plain(value) for name, value in chosen.items()}
    return {**renamed, "source_key": item.name, **item.own}


def plain(value: Any) -> Any:
    """Return a value as json holds it: no NaN, dates and decimals as text and numbers, bytes by their number."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, decimal.Decimal):
        return plain(float(value))
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)
