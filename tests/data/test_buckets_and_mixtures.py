"""Orders of batches from one bucket, and of several data sets by weight: pure functions of the position."""

from collections import Counter
from collections.abc import Callable
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_picture_content import photograph

from ldm.data import RankBatches, Record, ShardDataModule, ShardDataset, ShardOrder, write_shards
from ldm.data.buckets import SDXL_SIZES, BucketOrder, Buckets, GeneratedBuckets
from ldm.data.changes import differences
from ldm.data.mixture import BLOCK, MixtureOrder
from ldm.data.orders import training_order
from ldm.data.shards import ShardReader, index_shard
from ldm.data.sizes import picture_sizes, sizes_path

WriteNoise = Callable[..., Path]


def bucket_order(members: list[int], batch_size: int, seed: int = 0) -> BucketOrder:
    sizes = [len(members) // 3, len(members) - len(members) // 3]
    return BucketOrder(ShardOrder(sizes, seed=seed, block_size=1), np.array(members), batch_size=batch_size)


@settings(max_examples=40, deadline=None)
@given(members=st.lists(st.integers(0, 3), min_size=3, max_size=40), batch_size=st.integers(1, 5))
def test_every_batch_is_of_one_bucket_and_every_bucket_passes_through_its_epochs(
    members: list[int], batch_size: int
) -> None:
    order = bucket_order(members, batch_size)
    count = 6 * len(members) // batch_size * batch_size
    indices, epochs = order.take(0, count)
    for start in range(0, count, batch_size):
        assert len({members[i] for i in indices[start : start + batch_size]}) == 1
    for bucket in set(members):
        own = [(e, i) for e, i in zip(epochs.tolist(), indices.tolist(), strict=True) if members[i] == bucket]
        expected = [i for i, member in enumerate(members) if member == bucket]
        for epoch in range(len(own) // len(expected)):
            passed = own[epoch * len(expected) : (epoch + 1) * len(expected)]
            assert sorted(i for _, i in passed) == expected
            assert {e for e, _ in passed} == {epoch}


@settings(max_examples=25, deadline=None)
@given(
    position=st.integers(0, 400), count=st.integers(1, 60), weights=st.lists(st.integers(1, 9), min_size=2, max_size=3)
)
def test_orders_are_functions_of_the_position_alone(position: int, count: int, weights: list[int]) -> None:
    for unit in (1, 4):
        parts = [bucket_order([0, 1, 1, 0, 1, 1, 1], 4), bucket_order([0] * 5, 4), bucket_order([1] * 9, 4)]
        order = MixtureOrder(parts[: len(weights)], weights=weights, seed=1, unit=unit)
        whole = np.stack(order.take(0, position + count))
        np.testing.assert_array_equal(np.stack(order.take(position, count)), whole[:, position:])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_batches_of_one_bucket_whatever_their_number(world_size: int) -> None:
    members = np.random.default_rng(0).integers(0, 3, 50)
    order = bucket_order(members.tolist(), 8)
    ranks = [RankBatches(order, batch_size=8, position=16, rank=r, world_size=world_size) for r in range(world_size)]
    batches = [list(chain(*parts)) for parts in islice(zip(*ranks, strict=False), 10)]
    alone = list(islice(RankBatches(order, batch_size=8), 12))[2:]
    assert batches == alone
    assert all(len({members[i] for _, i, _ in batch}) == 1 for batch in batches)


def test_batches_of_buckets_are_mixed_over_an_epoch() -> None:
    members = [0] * 400 + [1] * 400
    order = BucketOrder(ShardOrder([100] * 8, seed=0), np.array(members), batch_size=10)
    buckets = [members[i] for i in order.take(0, 800)[0][::10]]
    runs = 1 + sum(a != b for a, b in pairwise(buckets))
    assert sum(buckets) == 40 and runs > 20


@pytest.mark.parametrize("weights", [[3, 1], [1, 1, 1], [0.7, 0.2, 0.1]])
def test_weights_hold_exactly_in_every_block_and_data_sets_keep_their_own_epochs(weights: list[float]) -> None:
    sizes = [10, 7, 100][: len(weights)]
    order = MixtureOrder([ShardOrder([n], seed=0) for n in sizes], weights=weights, seed=5)
    starts = np.cumsum([0, *sizes])
    for block in range(2):
        indices, epochs = order.take(block * BLOCK, BLOCK)
        members = np.searchsorted(starts, indices, side="right") - 1
        shares = np.bincount(members) / BLOCK
        np.testing.assert_allclose(shares, np.array(weights) / sum(weights), atol=1 / BLOCK)
        for member, size in enumerate(sizes):
            read = Counter(zip(indices[members == member].tolist(), epochs[members == member].tolist(), strict=True))
            assert max(read.values()) == 1
            assert max(epochs[members == member]) <= (block + 1) * shares[member] * BLOCK / size + 1
    # Not one set after the other.
    assert len(set(np.searchsorted(starts, order.take(0, 50)[0], side="right"))) == len(weights)


@pytest.mark.parametrize("weights", [[1.0], [1, 0], [1, 1e-6]])
def test_weights_that_cannot_be_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^data\.weights: got"):
        MixtureOrder([ShardOrder([3], seed=0)] * 2, weights=weights, seed=0)


def test_pictures_go_to_the_bucket_nearest_in_proportion() -> None:
    buckets = Buckets()
    assert len(buckets.sizes) == len(set(SDXL_SIZES)) == 40
    assert all(0.85 < height * width / 1024**2 <= 1.01 for height, width in SDXL_SIZES)
    sizes = np.array([(w, h) for h, w in SDXL_SIZES])
    assert [buckets.sizes[i] for i in buckets.assign(sizes)] == [(w, h) for h, w in SDXL_SIZES]
    found = buckets.assign(np.array([(5000, 5001), (9000, 10), (10, 9000), (1600, 900)]))
    assert [buckets.sizes[i] for i in found] == [(1024, 1024), (2048, 512), (512, 2048), (1344, 768)]


def test_generated_buckets_keep_within_area_and_sides() -> None:
    buckets = GeneratedBuckets(area=256 * 256, shortest=128, longest=384, step=64)
    assert buckets.sizes == [(384, 128), (320, 192), (256, 256), (192, 320), (128, 384)]
    with pytest.raises(ValueError, match=r"^data\.buckets: got area=100"):
        GeneratedBuckets(area=100, shortest=64, longest=128)


def test_training_batches_have_the_size_of_their_bucket_and_validation_one_size(tmp_path: Path) -> None:
    shapes = [(30, 15), (15, 30), (20, 20)]
    records = [Record(photograph(*shapes[i % 3]), f"{i}") for i in range(24)]
    write_shards(tmp_path, records, samples_per_shard=5)
    buckets = Buckets([[8, 16], [16, 8], [12, 12]])
    data = ShardDataModule(tmp_path, tmp_path, batch_size=4, resolution=8, buckets=buckets, columns=["target_width"])
    dataset = data.dataset("train")
    order = training_order(dataset, seed=0, block_size=2, batch_size=4)
    loader = data._loader(dataset, RankBatches(order, batch_size=4), substitutes=True)
    batches = [data.note(read, split="train") for read in islice(loader, 6)]
    assert {tuple(batch["image"].shape[2:]) for batch in batches} == {(8, 16), (16, 8), (12, 12)}
    for batch in batches:
        assert batch["target_width"].tolist() == [batch["image"].shape[3]] * 4
    assert sorted(int(c) for batch in batches for c in batch["caption"]) == list(range(24))
    assert {tuple(batch["image"].shape[2:]) for batch in data.iterate_once("validation", 4)} == {(8, 8)}


def test_sets_are_mixed_in_one_stream(write_noise: WriteNoise) -> None:
    train = {"a": str(write_noise(10, name="a")), "b": str(write_noise(30, name="b", samples_per_shard=10))}
    data = ShardDataModule(train, batch_size=4, resolution=8, weights={"b": 1, "a": 3})
    dataset = data.dataset("train")
    order = training_order(dataset, seed=0, block_size=2, batch_size=4, weights=data.weights)
    assert (dataset.group_sizes, len(dataset)) == ([2, 3], 40)
    indices, _ = order.take(0, BLOCK)
    assert (indices < 10).sum() == 3 * BLOCK // 4
    assert dataset[0, 10, 0]["caption"] == "noise 0"


@pytest.mark.parametrize("weights", [None, {"a": 1}, {"a": 1, "c": 1}])
def test_every_set_needs_a_weight(write_noise: WriteNoise, weights: Any) -> None:
    folder = str(write_noise(3))
    with pytest.raises(ValueError, match=r"^data\.weights: got .*expected one weight for each set"):
        ShardDataModule({"a": folder, "b": folder}, batch_size=1, resolution=8, weights=weights)


def test_captions_are_drawn_by_weight_and_what_is_missing_is_not(tmp_path: Path) -> None:
    columns: list[dict[str, Any]] = [{"long": "a long one", "many": ["x", "y"]}, {"long": None, "many": []}]
    write_shards(tmp_path, [Record(photograph(4, 4), "short", row) for row in columns])
    dataset = ShardDataset(tmp_path, resolution=4, captions={"txt": 1, "long": 2, "many": 1})
    drawn = Counter(dataset[0, 0, epoch]["caption"] for epoch in range(800))
    assert drawn.keys() == {"short", "a long one", "x", "y"}
    np.testing.assert_allclose([drawn[c] / 800 for c in ("short", "a long one", "x")], [0.25, 0.5, 0.125], atol=0.05)
    assert {dataset[1, 1, epoch]["caption"] for epoch in range(20)} == {"short"}
    assert (
        dataset[0, 0, 7]["caption"]
        == ShardDataset(tmp_path, resolution=4, captions={"txt": 1, "long": 2, "many": 1})[9, 0, 7]["caption"]
    )


def test_sizes_are_read_once_and_kept_beside_the_shard(
    write_noise: WriteNoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_shard(write_noise(5, samples_per_shard=5) / "00000.tar")
    reader = ShardReader()
    sizes = picture_sizes([index], reader)
    monkeypatch.setattr(reader, "read", None)
    np.testing.assert_array_equal(picture_sizes([index], reader), sizes)
    sizes_path(index).write_bytes(b"no array")
    np.testing.assert_array_equal(picture_sizes([index], ShardReader()), sizes)


def test_moving_a_shard_to_another_set_is_a_change(write_noise: WriteNoise) -> None:
    folder = write_noise(20, samples_per_shard=5)
    names = [str(folder / f"0000{i}.tar") for i in range(4)]
    weights = {"a": 1.0, "b": 1.0}
    two, three = (
        ShardDataModule({"a": names[:k], "b": names[k:]}, batch_size=4, resolution=8, weights=weights) for k in (2, 3)
    )
    assert "sets [2, 2] -> [3, 1]" in differences(two._record, three._record)
    assert "data.buckets" in differences(two._record | {"settings": {"data.buckets": "x"}}, two._record)


def test_a_substitute_is_of_the_same_set(write_noise: WriteNoise) -> None:
    folder = write_noise(20, samples_per_shard=5)
    names = [str(folder / f"0000{i}.tar") for i in range(4)]
    dataset = ShardDataset({"a": names[:1], "b": names[1:]}, resolution=8)
    assert list(dataset.substitutes(3)) == [4, 0, 1, 2]
    assert list(dataset.substitutes(18)) == [19, *range(5, 18)]
