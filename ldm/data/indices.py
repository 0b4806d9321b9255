"""The indices of many shards, of which those in use alone are in memory: those of 10 million samples take 1 GB."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from ldm.data.changes import mark
from ldm.data.embeddings import FLIPPED
from ldm.data.index_file import read_index
from ldm.data.shards import IMAGE_SUFFIXES, ShardIndex

# Samples whose indices are kept in memory, some 200 MB: more than two blocks of shards have.
HELD_SAMPLES = 2**21


class Summary(NamedTuple):
    """What is known of a shard without its index: how many samples have what, and which samples these are."""

    num_samples: int
    num_images: int
    num_moments: int
    num_flipped: int
    mark: str
    digest: str


@dataclass(frozen=True)
class _Stored:
    """An index that is kept beside its shard, or the rows of it that were chosen."""

    path: Path
    stamp: tuple[int, int]
    rows: np.ndarray | None

    def load(self) -> ShardIndex:
        index = read_index(self.path, stamp=self.stamp)
        if index is None:
            raise ValueError(f"{self.path}: got another index than at the start, or none; start the same command again")
        return index if self.rows is None else index.select(self.rows)


class ShardIndices(Sequence[ShardIndex]):
    """Indices in order, by number: those that `ldm data index` keeps beside their shards are read when they are used.

    Those made by scanning headers stay in memory. Threads may share an object, and processes have copies of their own.
    """

    def __init__(self, indices: Sequence[ShardIndex] = (), *, held_samples: int = HELD_SAMPLES) -> None:
        self.held_samples = held_samples
        self.summaries: list[Summary] = []
        self.paths: list[Path] = []
        self._indices: list[ShardIndex | _Stored] = []
        self._held: dict[int, ShardIndex] = {}
        for index in indices:
            self.append(index)

    def append(self, index: ShardIndex) -> None:
        """Add an index behind the others."""
        with_image, with_moments, with_flipped = (
            int(index.has_any(suffixes).sum()) for suffixes in (IMAGE_SUFFIXES, ["npy"], [FLIPPED])
        )
        digest = index.digest if index.rows is not None else ""
        self.summaries.append(Summary(len(index), with_image, with_moments, with_flipped, mark(index), digest))
        self.paths.append(index.path)
        if index.stamp is None:
            self._indices.append(index)
            return
        self._indices.append(_Stored(index.path, index.stamp, index.rows))
        self._hold(len(self._indices) - 1, index)

    @property
    def num_unstored(self) -> int:
        """How many samples have no index beside their shard, and stay in memory for good."""
        pairs = zip(self._indices, self.summaries, strict=True)
        return sum(summary.num_samples for index, summary in pairs if isinstance(index, ShardIndex))

    def replace(self, number: int, index: ShardIndex) -> None:
        """Put an index that is kept nowhere else in the place of another, whose summary stays."""
        self._indices[number], self.paths[number] = index, index.path

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, number: int) -> ShardIndex: ...
    @overload
    def __getitem__(self, number: slice) -> list[ShardIndex]: ...
    def __getitem__(self, number: int | slice) -> ShardIndex | list[ShardIndex]:
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        index = self._indices[number]
        if isinstance(index, ShardIndex):
            return index
        held = self._held.get(number)
        return held if held is not None else self._hold(number, index.load())

    def __iter__(self) -> Iterator[ShardIndex]:
        return (self[number] for number in range(len(self)))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_held": {}}

    def _hold(self, number: int, index: ShardIndex) -> ShardIndex:
        """Keep an index in memory, and let go of those that were read first where there are too many."""
        self._held[number] = index
        numbers = list(self._held)
        count = sum(self.summaries[each].num_samples for each in numbers)
        for each in numbers[:-1]:
            if count <= self.held_samples:
                break
            count -= self.summaries[each].num_samples
            self._held.pop(each, None)
        return index
