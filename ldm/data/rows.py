"""The metadata of each sample of a shard: its json member, or the rows of the parquet that img2dataset writes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ldm.data.shards import CorruptSampleError, ShardIndex, ShardReader, decode

METADATA = ("json", "parquet")
# The column of a parquet that names the sample.
KEY = "key"

# Names that published sets give to one column, in any of which it is looked for; LAION's WIDTH and HEIGHT are those of
# the original picture, while img2dataset's width and height are those after its resizing. Seen in: laion2B-en (URL,
# TEXT, WIDTH, HEIGHT, LICENSE, NSFW, similarity), laion-high-resolution (LANGUAGE, punsafe, pwatermark),
# laion2B-en-aesthetic (aesthetic), improved_aesthetics_* (AESTHETIC_SCORE), DataComp (text, original_width,
# clip_b32_similarity_score), img2dataset (caption, url, original_width).
ALIASES: tuple[tuple[str, ...], ...] = (
    ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score"),
    ("original_width", "WIDTH"),
    ("original_height", "HEIGHT"),
    ("similarity", "clip_b32_similarity_score"),
    ("caption", "TEXT", "text"),
    ("language", "LANGUAGE"),
    ("license", "LICENSE"),
    ("nsfw", "NSFW"),
    ("url", "URL"),
)
# What differs in more than its letters between lower and upper case.
CASE_MATTERS = ("width", "height")


def pixels_stated(value: Any) -> int | None:
    """Return a side in pixels that a column states: 1024.0, too, which tables with nulls write; else None."""
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(value) if is_whole and value > 0 else None


@dataclass(frozen=True)
class Unreadable:
    """A sample whose metadata cannot be read, and why."""

    reason: str


Row = dict[str, Any] | Unreadable


class MissingColumnError(ValueError):
    """A row lacks a column that was asked for."""


class ColumnNames:
    """Finds columns under the names that a set gives them: exact, else an alias, else in other letters' case."""

    def __init__(self, aliases: Mapping[str, str] | None = None) -> None:
        """`aliases` adds names of one's own: {"aesthetic": "my_score"}."""
        self.own = dict(aliases or {})
        self._known: dict[tuple[str, ...], dict[str, str]] = {}

    def view(self, row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
        """Return the values of the columns; raises MissingColumnError for one that is not there, or is twice."""
        shape = (*row, "", *columns)
        if shape not in self._known:
            self._known[shape] = {column: self.find(column, tuple(row)) for column in columns}
        return {column: row[name] for column, name in self._known[shape].items()}

    def find(self, column: str, available: Sequence[str]) -> str:
        """Return which of the available names a column has; raises MissingColumnError where none or several do."""
        own = self.own.get(column)
        if own is not None and own in available:
            return own
        if column in available:
            return column
        group = next((names for names in ALIASES if column in names), ())
        folds = {name.lower() for name in group or (column,) if _folds(name)}
        found = [name for name in group if name in available] or [name for name in available if name.lower() in folds]
        if len(found) == 1:
            return found[0]
        problem = f"got {found}, expected one of them" if found else "there is no such column"
        raise MissingColumnError(f"{column}: {problem}; the columns are {sorted(available)}")


def _folds(column: str) -> bool:
    return column.lower() not in CASE_MATTERS


def check_metadata(metadata: str) -> None:
    """Raise ValueError for a place of metadata that is not one of METADATA."""
    if metadata not in METADATA:
        raise ValueError(f"metadata: got {metadata}, expected one of {', '.join(METADATA)}")


def shard_rows(
    index: ShardIndex, reader: ShardReader, *, metadata: str = "json", samples: Sequence[int] | None = None
) -> Iterator[Row]:
    """Yield each sample's columns, or why they cannot be read, for these samples or all, in order.

    `metadata` is "json", the sample's own member, or "parquet", the file of img2dataset beside the shard.
    Raises ValueError where that file cannot be read, and ModuleNotFoundError without pyarrow.
    """
    check_metadata(metadata)
    chosen = range(len(index)) if samples is None else samples
    if metadata == "json":
        for sample in chosen:
            yield _json_row(index, sample, reader)
        return
    table = _parquet_rows(index.path.with_suffix(".parquet"))
    for sample in chosen:
        key = index.keys[sample]
        row = table.get(key, table.get(key.rpartition("/")[2]))
        yield Unreadable("no row in the parquet") if row is None else row


def _json_row(index: ShardIndex, sample: int, reader: ShardReader) -> Row:
    try:
        decoded = decode(index, sample, reader, suffixes=["json"])
    except CorruptSampleError as error:
        return Unreadable(str(error.__cause__ or error))
    return decoded["json"] if "json" in decoded else Unreadable("no json")


def _parquet_rows(path: Path) -> dict[str, dict[str, Any]]:
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ValueError(
            "metadata: got parquet, which needs the package pyarrow, expected it to be installed; "
            "install it, or read the json members: metadata=json"
        ) from error
    if not path.is_file():
        raise ValueError(f"metadata: got no {path}, expected the parquet that img2dataset writes beside each shard")
    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: got a parquet that cannot be read ({error}); write it again") from error
    if rows and KEY not in rows[0]:
        raise ValueError(f"{path}: got the columns {sorted(rows[0])}, expected {KEY} to be one of them")
    return {str(row[KEY]): row for row in rows}
