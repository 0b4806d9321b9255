"""The order of samples as a pure function of (seed, epoch, position), so that resuming needs one integer.

Every draw comes from Philox (Salmon et al. 2011), keyed by the seed and counted by what is drawn. Only its raw
words are used, whose sequence numpy keeps the same between releases (NEP 19), unlike its distributions'.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

# What a draw is for; the numbers are part of every stream of samples and never change.
PURPOSES = {"shards": 1, "samples": 2, "split": 4, "colours": 5, "words": 6, "mixture": 7}


def raw_words(count: int, *, seed: int, purpose: str, epoch: int, item: int = 0) -> np.ndarray:
    """Return `count` random uint64 that depend on the four keys alone."""
    bits = np.random.Philox(key=[seed, 0], counter=[0, item, epoch, PURPOSES[purpose]])
    words: np.ndarray = bits.random_raw(count)
    return words


def permutation(count: int, *, seed: int, purpose: str, epoch: int, item: int = 0) -> np.ndarray:
    """Return a random permutation of range(count), int64 (count,)."""
    words = raw_words(count, seed=seed, purpose=purpose, epoch=epoch, item=item)
    return np.argsort(words, kind="stable").astype(np.int64)


class Order(Protocol):
    """An endless stream of samples, as a pure function of the position in it."""

    num_samples: int

    def take(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sample indices and the epochs of `count` positions from `position` on, int64 (count,) each."""
        ...


class ShardOrder:
    """The endless stream of sample indices: each epoch all samples once, in an order of its own.

    An epoch permutes the shards, cuts them into blocks of `block_size` shards and permutes the samples inside each
    block: reading stays within a few shards while the order is close to a full shuffle. Samples are numbered
    through the shards as given. Position p of the stream belongs to epoch p // num_samples, so batches run on over
    the end of an epoch and its tail is never dropped.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, block_size: int = 16) -> None:
        """Raises ValueError for no samples, a negative seed or a block of no shards."""
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        if self.num_samples < 1:
            raise ValueError(f"shard_sizes: got {len(shard_sizes)} shards with no samples, expected at least one")
        if seed < 0:
            raise ValueError(f"seed: got {seed}, expected 0 or more")
        if block_size < 1:
            raise ValueError(f"block_size: got {block_size}, expected at least 1 shard")
        self.seed = seed
        self.block_size = block_size
        self._first_samples = np.cumsum(self.shard_sizes) - self.shard_sizes
        # Batches are read forward, so an epoch's layout and the block in use, with the next, are all it takes.
        self._layout = lru_cache(maxsize=2)(self._make_layout)
        self._block = lru_cache(maxsize=2)(self._make_block)

    def take(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sample indices and the epochs of `count` positions from `position` on, int64 (count,) each."""
        indices, epochs = [], []
        while count > 0:
            epoch, offset = divmod(position, self.num_samples)
            part = self._part(epoch, offset, count)
            indices.append(part)
            epochs.append(np.full(len(part), epoch, dtype=np.int64))
            position, count = position + len(part), count - len(part)
        return np.concatenate(indices), np.concatenate(epochs)

    def _part(self, epoch: int, offset: int, count: int) -> np.ndarray:
        """Return up to `count` samples of an epoch from `offset` on, as far as one block reaches."""
        _, ends = self._layout(epoch)
        block = int(np.searchsorted(ends, offset, side="right"))
        start = int(ends[block - 1]) if block else 0
        part: np.ndarray = self._block(epoch, block)[offset - start : offset - start + count]
        return part

    def _make_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's permuted shards and the position in the epoch at which each block ends."""
        shards = permutation(len(self.shard_sizes), seed=self.seed, purpose="shards", epoch=epoch)
        starts = np.arange(0, len(shards), self.block_size)
        return shards, np.cumsum(np.add.reduceat(self.shard_sizes[shards], starts))

    def _make_block(self, epoch: int, block: int) -> np.ndarray:
        shards, _ = self._layout(epoch)
        members = shards[block * self.block_size : (block + 1) * self.block_size]
        ranges = [self._first_samples[shard] + np.arange(self.shard_sizes[shard]) for shard in members]
        samples = np.concatenate(ranges)
        return samples[permutation(len(samples), seed=self.seed, purpose="samples", epoch=epoch, item=block)]


class RankBatches:
    """One rank's share of every global batch from a position on, without end.

    A batch is a list of (position, index, epoch), one for each of the rank's samples: its place in the stream, the
    sample, and the epoch in which it is read. Global batch j is positions j * batch_size to (j + 1) * batch_size;
    a rank takes a contiguous slice of it.
    """

    def __init__(self, order: Order, *, batch_size: int, position: int = 0, rank: int = 0, world_size: int = 1) -> None:
        """Raises ValueError when `batch_size`, the global batch, does not divide among the ranks."""
        self.batch_size = batch_size
        self.per_rank = batch_size_per_rank(batch_size, world_size)
        self.order = order
        self.position = position
        self.rank = rank

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        start = self.position + self.rank * self.per_rank
        while True:
            indices, epochs = self.order.take(start, self.per_rank)
            positions = range(start, start + self.per_rank)
            yield list(zip(positions, indices.tolist(), epochs.tolist(), strict=True))
            start += self.batch_size


class ShareBatches:
    """One rank's contiguous share of a split, each sample exactly once, in order, as (position, index, 0).

    Every rank has the same number of batches, because a forward under DDP or FSDP may wait for the other ranks.
    All but the last are full; where a rank's share is one sample larger than another's, its last may be too.
    """

    def __init__(self, num_samples: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        """`batch_size` counts this rank's samples. Raises ValueError when some rank would have no sample."""
        if not 1 <= world_size <= num_samples:
            raise ValueError(f"split: got {num_samples} samples for {world_size} ranks, expected one each at least")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        smallest_share = num_samples // world_size
        self.num_batches = -(-smallest_share // batch_size)
        self.batch_size = batch_size
        self.share = np.array_split(np.arange(num_samples), world_size)[rank]

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for batch in np.split(self.share, self.batch_size * np.arange(1, self.num_batches)):
            yield [(index, index, 0) for index in batch.tolist()]


def batch_size_per_rank(batch_size: int, world_size: int) -> int:
    """Return a rank's part of the global batch; raises ValueError when it does not divide."""
    if batch_size < 1:
        raise ValueError(f"data.batch_size: got {batch_size}, expected 1 or more")
    if batch_size % world_size:
        raise ValueError(
            f"data.batch_size: got {batch_size} for {world_size} processes, expected a multiple of {world_size}, "
            "because it counts the samples of all processes together"
        )
    return batch_size // world_size
