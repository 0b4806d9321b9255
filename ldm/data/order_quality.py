"""How well an order of samples is shuffled, and what a shuffle buffer makes of the same samples."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ldm.data.position import ShardOrder


@dataclass(frozen=True)
class OrderQuality:
    """How far an order is from the one in which samples are stored.

    Args:
        mean_displacement: mean |place in the order - place in the shards as they are read|, as a share of the number of
            samples; 1/3 for a full shuffle.
        same_shard_neighbours: share of neighbours in the order that lie in the same shard; about 1 / (number of shards)
            for a full shuffle.
        same_shard_in_batch: mean share of pairs in a batch that lie in the same shard.
    """

    mean_displacement: float
    same_shard_neighbours: float
    same_shard_in_batch: float

    def as_json(self) -> dict[str, float]:
        """Return the measures by name."""
        return asdict(self)


def measure_order(
    order: Sequence[int] | np.ndarray, shard_sizes: Sequence[int], *, batch_size: int = 256
) -> OrderQuality:
    """Measure one epoch: `order` int (N,) holds every sample's number, counted through the shards, once.

    Raises ValueError for an order that is no permutation of the samples.
    """
    indices, sizes = np.asarray(order, dtype=np.int64), np.asarray(shard_sizes, dtype=np.int64)
    if not np.array_equal(np.sort(indices), np.arange(sizes.sum())):
        raise ValueError(f"order: got {len(indices)} samples, expected each of {sizes.sum()} once")
    shards = np.searchsorted(np.cumsum(sizes), indices, side="right")
    # Where each sample would come if the shards were read whole, one after another, in the order in which they are met.
    met, first = np.unique(shards, return_index=True)
    rank = np.empty(len(sizes), dtype=np.int64)
    rank[met[np.argsort(first)]] = np.arange(len(met))
    starts = np.zeros(len(sizes), dtype=np.int64)
    by_rank = met[np.argsort(first)]
    starts[by_rank] = np.cumsum(sizes[by_rank]) - sizes[by_rank]
    stored = starts[shards] + indices - (np.cumsum(sizes) - sizes)[shards]
    displacement = np.abs(np.arange(len(indices)) - stored).mean() / len(indices)
    neighbours = (shards[1:] == shards[:-1]).mean() if len(shards) > 1 else 0.0
    return OrderQuality(float(displacement), float(neighbours), _pairs_in_batches(shards, batch_size))


def block_order(shard_sizes: Sequence[int], *, seed: int = 0, block_size: int = 16) -> np.ndarray:
    """Return one epoch of `ShardOrder`, int64 (N,)."""
    order = ShardOrder(shard_sizes, seed=seed, block_size=block_size)
    return order.take(0, order.num_samples)[0]


def buffer_order(shard_sizes: Sequence[int], *, seed: int = 0, buffer: int = 10_000) -> np.ndarray:
    """Return one epoch as a stream has it, int64 (N,): shards in a random order, read through a shuffle buffer.

    The buffer is filled, then gives a random one of its samples for each that comes in, as webdataset's does.
    """
    draws = random.Random(seed)
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    shards = list(range(len(sizes)))
    draws.shuffle(shards)
    held: list[int] = []
    order: list[int] = []
    for shard in shards:
        for index in range(int(starts[shard]), int(starts[shard] + sizes[shard])):
            held.append(index)
            if len(held) >= buffer:
                place = draws.randrange(len(held))
                held[place], held[-1] = held[-1], held[place]
                order.append(held.pop())
    draws.shuffle(held)
    return np.array(order + held, dtype=np.int64)


def _pairs_in_batches(shards: np.ndarray, batch_size: int) -> float:
    """Return the mean share of a batch's pairs that lie in the same shard; a part of a batch at the end is left out."""
    batches = shards[: len(shards) // batch_size * batch_size].reshape(-1, batch_size)
    if not len(batches) or batch_size < 2:
        return 0.0
    shares = []
    for batch in batches:
        _, counts = np.unique(batch, return_counts=True)
        shares.append((counts * (counts - 1)).sum() / (batch_size * (batch_size - 1)))
    return float(np.mean(shares))
