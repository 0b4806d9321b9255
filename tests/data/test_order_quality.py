import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.order_quality import block_order, buffer_order, measure_order

SIZES = [40] * 50


def test_the_order_of_storage_and_a_full_shuffle_are_the_two_ends() -> None:
    stored = measure_order(np.arange(2000), SIZES, batch_size=20)
    assert stored.mean_displacement == 0
    assert stored.same_shard_neighbours == pytest.approx(1 - 49 / 1999)
    assert stored.same_shard_in_batch == 1
    shuffled = measure_order(np.random.default_rng(0).permutation(2000), SIZES, batch_size=20)
    assert shuffled.mean_displacement == pytest.approx(1 / 3, abs=0.02)
    assert shuffled.same_shard_neighbours == pytest.approx(39 / 1999, abs=0.01)
    assert shuffled.same_shard_in_batch == pytest.approx(39 / 1999, abs=0.005)


def test_the_order_in_which_shards_are_read_is_no_displacement() -> None:
    order = np.arange(2000).reshape(50, 40)[np.random.default_rng(0).permutation(50)].ravel()
    assert measure_order(order, SIZES).mean_displacement == 0


def test_a_block_mixes_its_shards_as_a_full_shuffle_of_them_does() -> None:
    found = measure_order(block_order(SIZES, block_size=10), SIZES, batch_size=20)
    assert found.same_shard_neighbours == pytest.approx(39 / 399, abs=0.02)
    assert found.mean_displacement == pytest.approx(400 / 3 / 2000, rel=0.1)
    whole = measure_order(block_order(SIZES, block_size=50), SIZES)
    assert whole.mean_displacement == pytest.approx(1 / 3, abs=0.02)
    # A buffer as large as the block has a sample wait as long, but mixes in no more shards.
    buffered = measure_order(buffer_order(SIZES, buffer=400), SIZES, batch_size=20)
    assert buffered.same_shard_neighbours == pytest.approx(found.same_shard_neighbours, abs=0.05)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any), st.integers(1, 30), st.integers(0, 9))
def test_a_buffer_gives_each_sample_once(sizes: list[int], buffer: int, seed: int) -> None:
    order = buffer_order(sizes, buffer=buffer, seed=seed)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    measure_order(order, sizes, batch_size=3)


def test_what_is_no_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="expected each of 4 once"):
        measure_order([0, 1, 1, 3], [2, 2])
