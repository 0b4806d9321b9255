"""Indices of many shards: those in use are in memory, and every sample is found as if all were."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fault_shards import good, write_tar
from test_datamodule import fit, make_data

from ldm.data import ShardDataset, datamodule
from ldm.data.index_file import index_path
from ldm.data.indices import ShardIndices
from ldm.data.manifest import index_shards
from ldm.data.readable import each_readable, open_readable

WriteNoise = Callable[..., Path]


def keys(shards: ShardIndices) -> list[str]:
    return [key for shard in shards for key in shard.keys]


def test_only_so_many_samples_are_in_memory_and_all_are_found(write_noise: WriteNoise) -> None:
    folder = write_noise(23)
    scanned = ShardIndices(open_readable(folder)[0])
    index_shards(folder)
    few = ShardIndices(open_readable(folder)[0], held_samples=10)
    assert keys(few) == keys(scanned) == keys(pickle.loads(pickle.dumps(few)))
    assert few.summaries == scanned.summaries
    for number in (0, 3, 1, 1, 2):
        np.testing.assert_array_equal(few[number].offsets, scanned[number].offsets)
        assert sum(len(index) for index in few._held.values()) <= 10 + 7
    assert scanned._held == {}


def test_training_reads_the_same_whatever_is_in_memory(
    write_noise: WriteNoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_noise(23)
    expected = fit(folder, max_steps=12).seen
    index_shards(folder)
    monkeypatch.setattr(ShardIndices.__init__, "__kwdefaults__", {"held_samples": 1})
    assert fit(folder, max_steps=12).seen == expected
    assert fit(folder, max_steps=12, data={"num_workers": 2}).seen == expected


def test_chosen_rows_are_read_again_as_they_were_chosen(tmp_path: Path) -> None:
    rows = [good(f"{i}", jpg=None) if i % 3 == 0 else good(f"{i}") for i in range(9)]
    write_tar(tmp_path / "0.tar", [member for row in rows for member in row])
    write_tar(tmp_path / "1.tar", good("a"))
    index_shards(tmp_path)
    dataset = ShardDataset(tmp_path, resolution=8)
    dataset.shards.held_samples = 1
    for _ in range(2):
        assert keys(dataset.shards) == ["1", "2", "4", "5", "7", "8", "a"]
    assert dataset.shards[0].select(np.array([1, 3])).rows.tolist() == [2, 5]  # type: ignore[union-attr]


def test_an_index_that_changed_meanwhile_is_refused(write_noise: WriteNoise) -> None:
    folder = write_noise(9)
    index_shards(folder)
    few = ShardIndices([index for index, _ in each_readable(folder) if index is not None], held_samples=1)
    index_path(folder / "00000.tar").unlink()
    with pytest.raises(ValueError, match=r"00000\.tar: got another index than at the start, or none; start the same"):
        few[0]


def test_a_large_set_without_an_index_is_told_how_to_start_faster(
    write_noise: WriteNoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_noise(23)
    monkeypatch.setattr(datamodule, "HELD_SAMPLES", 20)
    with pytest.warns(UserWarning, match=r"^data\.train: 23 samples have no index beside .*`ldm data index"):
        make_data(folder).setup("fit")
    index_shards(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_data(folder).setup("fit")
