"""A loader whose workers are threads of the process that trains: what they decode need not be sent anywhere.

Decoding and scaling leave Python's lock to others, so that threads work side by side.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, Protocol, TypeVar

Batch = TypeVar("Batch")
Read = TypeVar("Read", covariant=True)
Place = tuple[int, int, int]
# Batches that a thread may be ahead.
AHEAD = 2


class Batched(Protocol[Read]):
    """What reads a batch in one call, from any thread."""

    def __getitems__(self, places: Sequence[Place]) -> Read: ...


class ThreadLoader(Generic[Batch]):
    """The batches of a data set in order, each read by one of `num_threads` threads, `AHEAD` a thread in advance.

    Iterating again starts again. What a thread raises is raised where its batch is due.
    """

    def __init__(self, dataset: Batched[Batch], batches: Iterable[Sequence[Place]], *, num_threads: int) -> None:
        self.dataset, self.batches, self.num_threads = dataset, batches, num_threads

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # as of a DataLoader: where the batches have a length

    def __iter__(self) -> Iterator[Batch]:
        pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="ldm-data")
        try:
            due: deque[Future[Batch]] = deque()
            batches = iter(self.batches)
            for places in islice(batches, self.num_threads * AHEAD):
                due.append(pool.submit(self.dataset.__getitems__, places))
            while due:
                batch = due.popleft().result()
                for places in islice(batches, 1):
                    due.append(pool.submit(self.dataset.__getitems__, places))
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
