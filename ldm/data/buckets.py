"""Aspect-ratio buckets: every batch holds pictures of one size, of many (Podell et al. 2023, section 2.3)."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ldm.data.position import Order

# (height, width) as published for SDXL (Podell et al. 2023, appendix I).
SDXL_SIZES = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600), (640, 1536),
    (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152), (896, 1152), (896, 1088),
    (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896), (1152, 896), (1152, 832),
    (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640), (1600, 640), (1664, 576),
    (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
)  # fmt: skip


class Buckets:
    """The sizes that pictures are scaled and cut to: each picture to that whose proportions are nearest to its own.

    Args:
        sizes: pairs [height, width] in pixels; None is SDXL's 40.

    Raises:
        ValueError: no sizes, or one that is not positive.
    """

    def __init__(self, sizes: Sequence[Sequence[int]] | None = None) -> None:
        pairs = [tuple(size) for size in (SDXL_SIZES if sizes is None else sizes)]
        if not pairs or any(len(pair) != 2 or min(pair) < 1 for pair in pairs) or len(set(pairs)) < len(pairs):
            raise ValueError(f"data.buckets: got the sizes {pairs}, expected different pairs [height, width] in pixels")
        self.sizes: list[tuple[int, int]] = [(int(width), int(height)) for height, width in pairs]

    def assign(self, sizes: np.ndarray) -> np.ndarray:
        """Return the place of each picture's bucket, int16 (N,), for sizes (N, 2) of (width, height)."""
        # Of proportions that are equally far, in logarithms, the first bucket.
        own = np.log([width / height for width, height in self.sizes])
        order = np.argsort(own, kind="stable")
        wanted = np.log(sizes[:, 0] / sizes[:, 1])
        middles = (own[order][1:] + own[order][:-1]) / 2
        return np.asarray(order[np.searchsorted(middles, wanted, side="left")], dtype=np.int16)


class GeneratedBuckets(Buckets):
    """Sizes whose sides are multiples of `step`: for every height, the largest width within `area` pixels.

    Raises:
        ValueError: no size fits.
    """

    def __init__(self, area: int, *, shortest: int, longest: int, step: int = 64) -> None:
        heights = range(-(-max(shortest, 1) // step) * step, longest + 1, step)
        sizes = [(height, min(longest, area // height) // step * step) for height in heights]
        sizes = [size for size in sizes if size[1] >= max(shortest, 1)]
        if not sizes:
            raise ValueError(
                f"data.buckets: got area={area}, step={step}, sides {shortest} to {longest}, which no size meets; "
                "allow longer sides"
            )
        super().__init__(sizes)


class BucketOrder:
    """Another order's samples in batches of one bucket each: a pure function of the position and the batch size.

    Every bucket reads its samples in the order in which the other one comes by them, epoch after epoch without a gap,
    so that none is left out. A batch stands where its last sample stands; what does not fill a batch waits for the
    next epoch's. Position p lies in global batch p // batch_size.
    """

    def __init__(self, order: Order, buckets: np.ndarray, *, batch_size: int) -> None:
        """`buckets` is the bucket of every sample of the order, int (num_samples,), by its index.

        Raises ValueError when the numbers of samples differ.
        """
        if len(buckets) != order.num_samples:
            raise ValueError(f"buckets: got {len(buckets)} for {order.num_samples} samples, expected one each")
        self.order, self.buckets, self.batch_size = order, buckets, batch_size
        self.num_samples = order.num_samples
        self.counts = np.bincount(buckets).astype(np.int64)
        self._epoch = lru_cache(maxsize=3)(self._make_epoch)
        self._batches = lru_cache(maxsize=2)(self._make_batches)

    def take(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sample indices and the epochs of `count` positions from `position` on, int64 (count,) each."""
        parts = []
        while count > 0:
            batch, offset = divmod(position, self.batch_size)
            taken = min(count, self.batch_size - offset)
            indices, epochs = self._members(batch)
            parts.append((indices[offset : offset + taken], epochs[offset : offset + taken]))
            position, count = position + taken, count - taken
        return np.concatenate([part for part, _ in parts]), np.concatenate([part for _, part in parts])

    def _members(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples of a global batch and the epochs in which they are read."""
        epoch = self._epoch_of(batch)
        bucket, number = self._batches(epoch)[batch - self._first_batch(epoch)]
        place, left = int(number) * self.batch_size, self.batch_size
        indices, epochs = [], []
        while left > 0:
            pass_, offset = divmod(place, int(self.counts[bucket]))
            ordered, starts, _ = self._epoch(pass_)
            part = ordered[starts[bucket] + offset : min(starts[bucket + 1], starts[bucket] + offset + left)]
            indices.append(part)
            epochs.append(np.full(len(part), pass_, dtype=np.int64))
            place, left = place + len(part), left - len(part)
        return np.concatenate(indices).astype(np.int64), np.concatenate(epochs)

    def _first_batch(self, epoch: int) -> int:
        """Count the batches that earlier epochs fill."""
        return int((epoch * self.counts // self.batch_size).sum())

    def _epoch_of(self, batch: int) -> int:
        """Return the epoch in which a batch is filled."""
        low, high = 0, 1
        while self._first_batch(high) <= batch:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._first_batch(middle) <= batch else (low, middle)
        return low

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return an epoch's samples by bucket, where each bucket starts, and each sample's place in the epoch."""
        indices, _ = self.order.take(epoch * self.num_samples, self.num_samples)
        places = np.argsort(self.buckets[indices], kind="stable")
        small = np.int32 if self.num_samples < 2**31 else np.int64  # of which there are three epochs in memory
        starts = np.concatenate([[0], np.cumsum(self.counts)])
        return indices[places].astype(small), starts, places.astype(small)

    def _make_batches(self, epoch: int) -> np.ndarray:
        """Return (bucket, number of the batch in the bucket) of an epoch's batches, int64 (n, 2), in their order."""
        _, starts, places = self._epoch(epoch)
        rows = []
        for bucket, count in enumerate(self.counts.tolist()):
            numbers = np.arange(epoch * count // self.batch_size, (epoch + 1) * count // self.batch_size)
            last = (numbers + 1) * self.batch_size - 1 - epoch * count
            rows.append(np.stack([places[starts[bucket] + last], np.full(len(numbers), bucket), numbers], axis=1))
        batches = np.concatenate(rows)
        return np.asarray(batches[np.argsort(batches[:, 0]), 1:])
