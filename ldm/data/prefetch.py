"""Remote shards fetched before they are read: those of the block in use, and those of the next."""

import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from ldm.data.dataset import ShardDataset
from ldm.data.position import Order

NUM_THREADS = 2


class Prefetch:
    """Fetches shards on threads of its own, in the order in which they will be read.

    What it cannot fetch it leaves to the reader, which says why. It never makes room at the cost of the block in use.
    """

    def __init__(self, dataset: ShardDataset, order: Order, block_size: int) -> None:
        assert dataset.remote is not None
        self._cache = dataset.remote
        self._dataset = dataset
        self._order = order
        # As many samples as a block has on average; an order need not have blocks of one size.
        self._span = max(1, order.num_samples * block_size // max(1, len(dataset.shards)))
        self._tasks: SimpleQueue[tuple[Path, Collection[Path]] | None] = SimpleQueue()
        self._spans: dict[int, list[Path]] = {}
        for _ in range(NUM_THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def advance(self, position: int) -> None:
        """Say where reading has come to; the shards from there on, to the end of the next block, are fetched."""
        here = position // self._span
        if {here, here + 1} == self._spans.keys():
            return
        self._spans = {span: self._spans.get(span) or self._shards(span * self._span) for span in (here, here + 1)}
        for path in dict.fromkeys([*self._spans[here], *self._spans[here + 1]]):
            self._tasks.put((path, frozenset(self._spans[here])))

    def close(self) -> None:
        """End the threads, each after what it is fetching."""
        for _ in range(NUM_THREADS):
            self._tasks.put(None)

    def _shards(self, start: int) -> list[Path]:
        """Return the shards of a span of samples, in the order in which they are met."""
        indices, _ = self._order.take(start, self._span)
        numbers = np.searchsorted(self._dataset.first_samples, indices, side="right") - 1
        return [self._dataset.shards.paths[number] for number in dict.fromkeys(numbers.tolist())]

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            path, keep = task
            # Whatever is wrong is wrong for the reader too, which is the one to say so.
            with suppress(OSError, ValueError):
                if self._cache.owns(path):
                    self._cache.fetch(path, keep=keep)
