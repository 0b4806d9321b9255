"""The order in which training reads a data set: of one set or several, in batches of any or of one bucket."""

from collections.abc import Mapping

import numpy as np

from ldm.data.buckets import BucketOrder
from ldm.data.dataset import ShardDataset
from ldm.data.mixture import MixtureOrder
from ldm.data.position import Order, ShardOrder


def training_order(
    dataset: ShardDataset, *, seed: int, block_size: int, batch_size: int, weights: Mapping[str, float] | None = None
) -> Order:
    """Return the order of a data set's samples; `weights` are by set, in the order in which the data set has them.

    Raises ValueError for weights that cannot be.
    """
    ends = np.cumsum(dataset.group_sizes)
    orders: list[Order] = []
    for start, end in zip(ends - dataset.group_sizes, ends, strict=True):
        order: Order = ShardOrder(dataset.shard_sizes[start:end], seed=seed, block_size=block_size)
        if dataset.bucket_of is not None:
            members = dataset.bucket_of[dataset.first_samples[start] : dataset.first_samples[end]]
            order = BucketOrder(order, members, batch_size=batch_size)
        orders.append(order)
    if weights is None:
        return orders[0]
    unit = 1 if dataset.bucket_of is None else batch_size
    return MixtureOrder(orders, weights=list(weights.values()), seed=seed, unit=unit)


def check_weights(sets: object, weights: Mapping[str, float] | None) -> None:
    """Raise ValueError unless weights are given for exactly the named sets, where sets are named."""
    names = list(sets) if isinstance(sets, Mapping) else None
    if (names is None) != (weights is None) or sorted(names or ()) != sorted(weights or ()):
        raise ValueError(
            f"data.weights: got {None if weights is None else dict(weights)} for data.train={names or 'one set'}, "
            "expected one weight for each set of data.train, as in data.train={a: shards/a, b: shards/b} "
            "data.weights={a: 3, b: 1}"
        )
