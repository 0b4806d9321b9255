"""Batches without bad samples: another sample stands in for each, which one being a function of the sample alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from torch.utils.data import Dataset

from ldm.data.faults import KINDS, Fault
from ldm.data.ledger import BadDataError
from ldm.data.shards import CorruptSampleError

Place = tuple[int, int, int]
Item = dict[str, Any]
# From samples, as they come, and their number to a batch.
Assemble = Callable[[Iterator[Item], int], Item]
# How many samples in a row may be bad before reading gives up.
MAX_TRIES = 64


class Readable(Protocol):
    """What a batch is read from: `ldm.data.ShardDataset`."""

    def __len__(self) -> int: ...

    def read(self, place: Place) -> Item: ...

    def located(self, index: int) -> tuple[str, str]:
        """Return the shard and the key of a sample."""
        ...

    def substitutes(self, index: int) -> Iterator[int]:
        """Yield the samples that may stand in for one, in the order in which they are tried."""
        ...


@dataclass
class Read:
    """What reading a batch gave: the batch, the faults that were met and where, and why there is no batch."""

    batch: Item | None = None
    faults: list[tuple[int, Fault]] = field(default_factory=list)
    failure: Exception | None = None


class GoodSamples(Dataset[Item]):
    """Reads batch after batch of a data set, for a loader; no bad sample raises.

    With `substitutes`, as in training, the next sample that can be read stands in for a bad one: a function of the
    sample, so that every rank and every resumed run takes the same. Without, as in a single pass, it is left out, and
    only a batch of nothing but bad samples has a substitute. `missing_caption` is "empty" or "skip", which counts a
    sample without a caption as bad.
    """

    def __init__(self, dataset: Readable, *, substitutes: bool, missing_caption: str, assemble: Assemble) -> None:
        self.dataset = dataset
        self.substitutes = substitutes
        self.missing_caption = missing_caption
        self.assemble = assemble

    def __getitems__(self, places: Sequence[Place]) -> Read:
        """Read a batch; the position of each fault is that of the place at which it was met."""
        read = Read()
        try:
            if self.substitutes:
                read.batch = self.assemble((self._good(place, read) for place in places), len(places))
            else:
                found = [item for place in places if (item := self._attempt(place, place[1], read)) is not None]
                items = found or [self._good(places[0], read)]
                read.batch = self.assemble(iter(items), len(items))
        except Exception as error:  # told by the process that trains: a worker's traceback says less than its message
            read.failure = error
        return read

    def _good(self, place: Place, read: Read) -> Item:
        """Return the sample of a place, or the first that can stand in for it."""
        item = self._attempt(place, place[1], read)
        if item is not None:
            return item
        for index in islice(self.dataset.substitutes(place[1]), MAX_TRIES):
            item = self._attempt(place, index, read)
            if item is not None:
                return item
        shard, key = self.dataset.located(place[1])
        raise BadDataError(
            f"{shard}: {key} cannot be read, nor can the {MAX_TRIES} samples that follow it, the last because of "
            f"{read.faults[-1][1].reason}; expected good samples among them; see `ldm data validate`"
        )

    def _attempt(self, place: Place, index: int, read: Read) -> Item | None:
        """Return a sample, or None for a bad one; raises CorruptSampleError where no other sample may stand in."""
        try:
            item = self.dataset.read((place[0], index, place[2]))
            if self.missing_caption == "empty" or str(item["caption"]).strip():
                return item
            kind, reason = "missing_caption", "got no caption"
        except CorruptSampleError as error:
            if KINDS[error.kind].outcome == "refused":
                raise
            kind, reason = error.kind, error.reason
        read.faults.append((place[0], Fault(*self.dataset.located(index), kind, reason)))
        return None
