"""Whatever is bad, what is read in its place is a function of the sample, not of ranks, batches or what came before."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data import CorruptSampleError, RankBatches, ShardOrder
from ldm.data.substitutes import MAX_TRIES, GoodSamples

few = settings(max_examples=60, deadline=None)


class Numbers:
    """A data set whose samples are their own numbers, some of them bad."""

    def __init__(self, count: int, bad: set[int], *, kind: str = "broken_image") -> None:
        self.count, self.bad, self.kind = count, bad, kind

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: tuple[int, int, int]) -> dict[str, Any]:
        return self.read(place)

    def read(self, place: tuple[int, int, int]) -> dict[str, Any]:
        position, index, epoch = place
        if index in self.bad:
            raise CorruptSampleError(f"0.tar: {index}: bad", kind=self.kind, reason="bad")
        return {"caption": "", "index": index, "position": position, "epoch": epoch}

    def located(self, index: int) -> tuple[str, str]:
        return "0.tar", str(index)

    def substitutes(self, index: int) -> Iterator[int]:
        return ((index + step) % self.count for step in range(1, self.count))


def good_samples(dataset: Numbers, *, substitutes: bool = True) -> GoodSamples:
    return GoodSamples(
        dataset, substitutes=substitutes, missing_caption="empty", assemble=lambda items, count: {"items": list(items)}
    )


@few
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.sets(st.integers(0, 53)),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.integers(0, 60),
)
def test_ranks_read_what_one_process_reads_and_never_a_bad_sample(
    sizes: list[int], bad: set[int], world_size: int, position: int
) -> None:
    count = sum(sizes)
    bad = {index for index in bad if index < count} - {count - 1}
    order, dataset = ShardOrder(sizes, seed=1, block_size=2), Numbers(count, bad)

    def read(rank: int, world: int, start: int, batches: int) -> list[list[dict[str, Any]]]:
        places = RankBatches(order, batch_size=12, position=start, rank=rank, world_size=world)
        reading = good_samples(dataset)
        found = [reading.__getitems__(place) for place in islice(places, batches)]
        assert all(one.failure is None and one.batch for one in found)
        return [one.batch["items"] for one in found if one.batch]

    alone = read(0, 1, position, 3)
    ranks = [read(rank, world_size, position, 3) for rank in range(world_size)]
    assert [list(chain(*(rank[batch] for rank in ranks))) for batch in range(3)] == alone
    assert read(0, 1, position + 24, 1) == alone[2:]
    for batch, start in zip(alone, range(position, position + 36, 12), strict=True):
        assert not {item["index"] for item in batch} & bad
        assert [item["position"] for item in batch] == list(range(start, start + 12))


@few
@given(st.sets(st.integers(0, 19), max_size=19), st.integers(1, 7))
def test_a_single_pass_has_each_good_sample_once(bad: set[int], batch_size: int) -> None:
    reading = good_samples(Numbers(20, bad), substitutes=False)
    found = []
    for start in range(0, 20, batch_size):
        places = [(i, i, 0) for i in range(start, min(20, start + batch_size))]
        read = reading.__getitems__(places)
        assert {int(fault.key) for _, fault in read.faults} >= bad & {index for _, index, _ in places}
        if any(index not in bad for _, index, _ in places):
            found += [item["index"] for item in read.batch["items"]]  # type: ignore[index]
        else:
            assert len(read.batch["items"]) == 1, "a rank's batch is never empty"  # type: ignore[index]
    assert found == sorted(set(range(20)) - bad)


def test_reading_gives_up_after_so_many_bad_samples_in_a_row() -> None:
    for run, gives_up in ((MAX_TRIES, False), (MAX_TRIES + 1, True)):
        read = good_samples(Numbers(200, set(range(run)))).__getitems__([(0, 0, 0)])
        assert (read.failure is not None) == gives_up


def test_moments_of_another_encoder_have_no_substitute() -> None:
    read = good_samples(Numbers(5, {2}, kind="foreign_moments")).__getitems__([(0, 2, 0)])
    with pytest.raises(CorruptSampleError, match="bad"):
        raise read.failure or AssertionError
