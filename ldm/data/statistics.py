"""What is measured of each shard for `ldm data report`, in one pass and in bounded memory."""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.captions import caption_of
from ldm.data.expressions import all_of, is_null
from ldm.data.filters import Filter
from ldm.data.index_file import open_index
from ldm.data.kept import Survival
from ldm.data.rows import Row, Unreadable, shard_rows
from ldm.data.shards import IMAGE_SUFFIXES, CorruptSampleError, ShardIndex, ShardReader, decode
from ldm.data.similar import difference_hash, white_border

# Different texts of a column that are counted; a column with more is told as such.
MAX_TEXTS = 1000
THUMBNAIL = 112


@dataclass
class ColumnValues:
    """The values of a metadata column: numbers, texts by how often, and what was null or something else."""

    numbers: list[float] = field(default_factory=list)
    texts: Counter[str] = field(default_factory=Counter)
    num_texts: int = 0
    num_nulls: int = 0
    num_others: int = 0

    def add(self, value: Any) -> None:
        """Count one value."""
        if is_null(value):
            self.num_nulls += 1
        elif isinstance(value, str | bool):
            self.num_texts += 1
            self._count(str(value), 1)
        elif isinstance(value, int | float):
            self.numbers.append(float(value))
        else:
            self.num_others += 1

    def merge(self, other: "ColumnValues") -> None:
        """Count another part's values too."""
        self.numbers += other.numbers
        self.num_texts += other.num_texts
        self.num_nulls += other.num_nulls
        self.num_others += other.num_others
        for text, count in other.texts.items():
            self._count(text, count)

    def _count(self, text: str, count: int) -> None:
        shortened = text[:200]
        if shortened in self.texts or len(self.texts) < MAX_TEXTS:
            self.texts[shortened] += count


@dataclass(frozen=True)
class Picture:
    """An image that was decoded: its place, size in pixels and bytes, look and caption."""

    shard: str
    key: str
    width: int
    height: int
    num_bytes: int
    suffix: str
    hash: int
    white: float
    caption: str
    thumbnail: str


@dataclass
class Measured:
    """What was measured of one shard, or of many."""

    num_samples: int = 0
    num_bytes: dict[str, int] = field(default_factory=dict)
    num_members: dict[str, int] = field(default_factory=dict)
    caption_words: list[int] = field(default_factory=list)
    caption_letters: list[int] = field(default_factory=list)
    columns: dict[str, ColumnValues] = field(default_factory=dict)
    num_rows: int = 0
    pictures: list[Picture] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    survivals: dict[str, Survival] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    def merge(self, other: "Measured") -> None:
        """Add what was measured of another shard."""
        self.num_samples += other.num_samples
        self.num_rows += other.num_rows
        for mine, theirs in ((self.num_bytes, other.num_bytes), (self.num_members, other.num_members)):
            for suffix, count in theirs.items():
                mine[suffix] = mine.get(suffix, 0) + count
        for name, values in other.columns.items():
            self.columns.setdefault(name, ColumnValues()).merge(values)
        for name, survival in other.survivals.items():
            self.survivals.setdefault(name, Survival()).add(survival)
        self.refusals = {**other.refusals, **self.refusals}
        self.caption_words += other.caption_words
        self.caption_letters += other.caption_letters
        self.pictures += other.pictures
        self.unreadable += other.unreadable


@dataclass(frozen=True)
class Task:
    """One shard, with the samples whose metadata are read, whose image is decoded, and that get a thumbnail."""

    path: Path
    rows: Sequence[int]
    images: Sequence[int]
    thumbnails: frozenset[int]


def measure_shard(task: Task, *, filters: Mapping[str, Filter], metadata: str = "json") -> Measured:
    """Measure one shard; raises ValueError for one that cannot be indexed."""
    index, reader, found = open_index(task.path), ShardReader(), Measured()
    found.num_samples = len(index)
    for column, suffix in enumerate(index.suffixes):
        sizes = index.sizes[:, column]
        found.num_members[suffix] = int((sizes >= 0).sum())
        found.num_bytes[suffix] = int(sizes[sizes >= 0].sum())
    rows = shard_rows(index, reader, metadata=metadata, samples=task.rows)
    for sample, row in zip(task.rows, rows, strict=True):
        _measure_row(index, sample, row, reader, filters, found)
    for sample in task.images:
        _measure_image(index, sample, reader, found, thumbnail=sample in task.thumbnails)
    reader.close()
    return found


def _measure_row(
    index: ShardIndex, sample: int, row: Row, reader: ShardReader, filters: Mapping[str, Filter], found: Measured
) -> None:
    """Count a sample's caption and columns, and judge it by each filter."""
    found.num_rows += 1
    place = f"{index.path.name}: {index.keys[sample]}"
    columns = {} if isinstance(row, Unreadable) else row
    caption = _caption(index, sample, columns, reader)
    found.caption_words.append(len(caption.split()))
    found.caption_letters.append(len(caption))
    for name, value in columns.items():
        found.columns.setdefault(name, ColumnValues()).add(value)
    for name, chosen in filters.items():
        survival = found.survivals.setdefault(name, Survival())
        survival.num_samples += 1
        if isinstance(row, Unreadable):
            survival.add_unreadable(place, row.reason)
            continue
        try:
            verdicts = chosen.verdicts(row)
        except ValueError as error:
            found.refusals.setdefault(name, f"{place}: {error}")
            continue
        kept = all_of(verdicts)
        survival.add_row(verdicts, kept=chosen.nulls == "keep" if kept is None else kept)


def _measure_image(index: ShardIndex, sample: int, reader: ShardReader, found: Measured, *, thumbnail: bool) -> None:
    members = index.members(sample)
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if suffix is None:
        return
    try:
        image = decode(index, sample, reader, suffixes=[suffix])[suffix]
    except CorruptSampleError as error:
        found.unreadable.append(str(error))
        return
    found.pictures.append(
        Picture(
            shard=index.path.name,
            key=index.keys[sample],
            width=image.width,
            height=image.height,
            num_bytes=members[suffix][1],
            suffix=suffix,
            hash=difference_hash(image),
            white=white_border(image),
            caption=_caption(index, sample, {}, reader)[:300] if thumbnail else "",
            thumbnail=_thumbnail(image) if thumbnail else "",
        )
    )


def _caption(index: ShardIndex, sample: int, columns: Mapping[str, Any], reader: ShardReader) -> str:
    """Return the caption that training would read, or "" where it cannot be read."""
    members = index.members(sample)
    try:
        if "txt" in members:
            return str(decode(index, sample, reader, suffixes=["txt"])["txt"])
        if "caption" not in columns and "json" in members:
            columns = decode(index, sample, reader, suffixes=["json"])["json"]
    except CorruptSampleError:
        return ""
    return caption_of(None, columns)


def _thumbnail(image: Image.Image) -> str:
    """Return a small JPEG as text, ready for a page."""
    small, stream = image.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    small.save(stream, format="JPEG", quality=80)
    return base64.b64encode(stream.getvalue()).decode()


def spread(count: int, chosen: int) -> np.ndarray:
    """Return `chosen` of range(count), or all where there are fewer, evenly spread, int64."""
    if chosen >= count:
        return np.arange(count, dtype=np.int64)
    return (2 * np.arange(chosen, dtype=np.int64) + 1) * count // (2 * chosen)
