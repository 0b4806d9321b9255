from itertools import chain, islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data import RankBatches, ShardOrder
from ldm.data.position import ShareBatches, batch_size_per_rank

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)
seeds = st.integers(0, 2**40)
blocks = st.integers(1, 5)
few = settings(max_examples=60, deadline=None)


def stream(order: ShardOrder, start: int, stop: int) -> list[int]:
    return order.take(start, stop - start)[0].tolist()


@few
@given(sizes, seeds, blocks, st.integers(0, 3))
def test_every_epoch_reads_every_sample_once(shard_sizes: list[int], seed: int, block_size: int, epoch: int) -> None:
    order = ShardOrder(shard_sizes, seed=seed, block_size=block_size)
    indices, epochs = order.take(epoch * order.num_samples, order.num_samples)
    assert sorted(indices.tolist()) == list(range(sum(shard_sizes)))
    assert set(epochs.tolist()) == {epoch}


@few
@given(sizes, seeds, blocks, st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_reading_in_pieces_gives_the_same_stream(
    shard_sizes: list[int], seed: int, block_size: int, pieces: list[int]
) -> None:
    whole = stream(ShardOrder(shard_sizes, seed=seed, block_size=block_size), 0, sum(pieces))
    order = ShardOrder(shard_sizes, seed=seed, block_size=block_size)
    bounds = np.cumsum([0, *pieces]).tolist()
    parts = [stream(order, start, stop) for start, stop in pairwise(bounds)]
    # Backwards too: what was read before must not matter.
    assert list(chain(*parts)) == whole
    assert [stream(order, *span) for span in reversed(list(pairwise(bounds)))] == parts[::-1]


@few
@given(sizes, seeds, st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 100))
def test_ranks_together_read_the_global_batch_in_order(
    shard_sizes: list[int], seed: int, world_size: int, position: int
) -> None:
    order = ShardOrder(shard_sizes, seed=seed)
    alone = next(iter(RankBatches(order, batch_size=12, position=position)))
    ranks = [
        next(iter(RankBatches(order, batch_size=12, position=position, rank=rank, world_size=world_size)))
        for rank in range(world_size)
    ]
    assert list(chain(*ranks)) == alone
    assert [place[0] for place in alone] == list(range(position, position + 12))


@few
@given(sizes, seeds, st.sampled_from([1, 2, 4, 8]))
def test_accumulating_small_batches_reads_the_same_samples(shard_sizes: list[int], seed: int, parts: int) -> None:
    order = ShardOrder(shard_sizes, seed=seed)
    large = list(chain(*islice(RankBatches(order, batch_size=8), 3)))
    small = list(chain(*islice(RankBatches(order, batch_size=8 // parts), 3 * parts)))
    assert small == large


def test_starting_later_goes_on_where_the_stream_would_have_been() -> None:
    order = ShardOrder([5, 6, 7], seed=3)
    whole = list(islice(RankBatches(order, batch_size=4, rank=1, world_size=2), 12))
    later = list(islice(RankBatches(order, batch_size=4, position=20, rank=1, world_size=2), 7))
    assert later == whole[5:]


def test_the_tail_of_an_epoch_opens_the_batches_of_the_next() -> None:
    order = ShardOrder([5], seed=0)
    batches = list(islice(RankBatches(order, batch_size=3), 5))
    assert [[place[2] for place in batch] for batch in batches] == [[0] * 3, [0, 0, 1], [1] * 3, [1, 2, 2], [2] * 3]


def test_a_batch_may_be_larger_than_the_data() -> None:
    batch = next(iter(RankBatches(ShardOrder([3], seed=0), batch_size=8)))
    assert [place[2] for place in batch] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_block_reads_from_its_own_shards_alone() -> None:
    order = ShardOrder([10] * 8, seed=1, block_size=2)
    shards = np.array(stream(order, 0, 80)) // 10
    assert [len(set(block)) for block in shards.reshape(4, 20).tolist()] == [2, 2, 2, 2]


def test_samples_are_shuffled_inside_a_block_and_anew_each_epoch() -> None:
    order = ShardOrder([50], seed=1)
    first, second = stream(order, 0, 50), stream(order, 50, 100)
    assert first != sorted(first)
    assert first != second
    assert first != stream(ShardOrder([50], seed=2), 0, 50)


def test_the_order_of_a_seed_never_changes() -> None:
    # A run that is resumed after an upgrade must find its place in the same stream.
    assert stream(ShardOrder([4, 3, 5], seed=7, block_size=2), 0, 14) == [6, 4, 5, 11, 10, 9, 8, 7, 1, 0, 2, 3, 9, 2]


@few
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 8))
def test_shares_hold_each_sample_once_in_as_many_batches_on_every_rank(
    num_samples: int, batch_size: int, world_size: int
) -> None:
    world_size = min(world_size, num_samples)
    ranks = [
        list(ShareBatches(num_samples, batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert [index for batches in ranks for batch in batches for _, index, _ in batch] == list(range(num_samples))
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) == batch_size for batches in ranks for batch in batches[:-1])
    assert all(1 <= len(batches[-1]) <= batch_size + (world_size > 1) for batches in ranks)


def test_a_batch_that_does_not_divide_among_processes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 10 for 4 processes, expected a multiple of 4"):
        batch_size_per_rank(10, 4)


def test_fewer_samples_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 3 samples for 4 ranks"):
        ShareBatches(3, batch_size=2, world_size=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_sizes": [], "seed": 0}, "no samples"),
        ({"shard_sizes": [0, 0], "seed": 0}, "no samples"),
        ({"shard_sizes": [1], "seed": -1}, "seed: got -1"),
        ({"shard_sizes": [1], "seed": 0, "block_size": 0}, "block_size: got 0"),
    ],
)
def test_an_impossible_order_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardOrder(**options)
