"""Several orders of samples in one stream, by weight: exact, and a pure function of the position."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ldm.data.position import Order, permutation

# Places that are dealt out at a time; weights hold to one part in as many.
BLOCK = 4096


class MixtureOrder:
    """Draws from several orders in proportion to their weights; each passes through epochs of its own.

    Of every BLOCK places, each order has its share, rounded, in a random arrangement. With `unit` above 1 a place is a
    run of so many samples of one order: a batch, where batches must not be mixed.
    """

    def __init__(self, orders: Sequence[Order], *, weights: Sequence[float], seed: int, unit: int = 1) -> None:
        """The samples of each order are numbered behind those of the one before.

        Raises ValueError for weights that are not one each, not positive, or below one part in BLOCK of all.
        """
        if len(weights) != len(orders) or any(not weight > 0 for weight in weights):
            raise ValueError(f"data.weights: got {list(weights)}, expected {len(orders)} positive numbers")
        shares = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
        counts = np.floor(shares).astype(np.int64)
        counts[np.argsort(counts - shares, kind="stable")[: BLOCK - int(counts.sum())]] += 1
        if counts.min() < 1:
            raise ValueError(f"data.weights: got {list(weights)}, expected each at least 1 / {BLOCK} of their sum")
        self.orders, self.counts, self.seed, self.unit = list(orders), counts, seed, unit
        self.num_samples = sum(order.num_samples for order in orders)
        self._first_samples = np.cumsum([0, *(order.num_samples for order in orders)])
        self._block = lru_cache(maxsize=2)(self._make_block)

    def take(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sample indices and the epochs of `count` positions from `position` on, int64 (count,) each."""
        places, offsets = np.divmod(np.arange(position, position + count), self.unit)
        blocks, rows = np.divmod(places, BLOCK)
        members, starts = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            dealt, ranks = self._block(block)
            members[here] = dealt[rows[here]]
            starts[here] = block * self.counts[members[here]] + ranks[rows[here]]
        starts = starts * self.unit + offsets
        indices, epochs = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        for member in np.unique(members).tolist():
            here = members == member  # one after the other, for each order is read in its own order
            indices[here], epochs[here] = self.orders[member].take(int(starts[here][0]), int(here.sum()))
            indices[here] += self._first_samples[member]
        return indices, epochs

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each place of a block, whose it is and how many of the same one's come before it in the block."""
        dealt = np.repeat(np.arange(len(self.counts)), self.counts)
        members = dealt[permutation(BLOCK, seed=self.seed, purpose="mixture", epoch=0, item=block)]
        ranks = np.empty(BLOCK, dtype=np.int64)
        starts = np.cumsum(self.counts) - self.counts
        by_member = np.argsort(members, kind="stable")
        ranks[by_member] = np.arange(BLOCK) - starts[members[by_member]]
        return members, ranks
