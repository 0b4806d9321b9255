import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_shards import good, write_shard_faults, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm.data import ShardDataset, ShardIndex, index_shard
from ldm.data import index_file as index_file_module
from ldm.data.index_file import index_path, open_index, read_index, save_index, stamp_of
from ldm.data.manifest import CONTENTS, index_shards, read_contents
from ldm.data.readable import open_whole_samples

WriteNoise = Callable[..., Path]


def same(first: ShardIndex, second: ShardIndex) -> bool:
    arrays = [(first.offsets, second.offsets), (first.sizes, second.sizes)]
    told = (first.path, first.keys, first.suffixes) == (second.path, second.keys, second.suffixes)
    return told and all(a.shape == b.shape and (a == b).all() for a, b in arrays)


keys = st.lists(
    st.text(st.sampled_from("ab/é0"), min_size=1, max_size=6).filter(lambda key: key[-1] != "/"), unique=True
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys, st.sets(st.sampled_from(["jpg", "txt", "json", "npy"]), min_size=1))
def test_an_index_is_read_as_it_was_saved(tmp_path: Path, names: list[str], suffixes: set[str]) -> None:
    members = [
        (f"{name}.{suffix}", bytes(i)) for i, name in enumerate(names) for suffix in sorted(suffixes)[: 1 + i % 3]
    ]
    path = write_tar(tmp_path / "x.tar", members)
    scanned = index_shard(path)
    save_index(scanned, stamp=stamp_of(path))
    kept = read_index(path)
    assert kept is not None
    assert same(kept, scanned)
    assert kept.digest == scanned.digest


def test_keys_that_are_no_utf8_are_kept_too(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("kéy.txt", b"x")])
    path.write_bytes(_with_sums(path.read_bytes().replace("é".encode(), b"\xff\xfe")))
    save_index(index_shard(path), stamp=stamp_of(path))
    assert open_index(path).keys == index_shard(path).keys == ("k\udcff\udcfey",)


def _with_sums(content: bytes) -> bytes:
    header = bytearray(content[:512])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]


def test_training_reads_the_index_instead_of_the_headers(
    write_noise: WriteNoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_noise(23)
    expected = ShardDataset(folder, resolution=8)
    index_shards(folder)

    def refuse(path: Path) -> ShardIndex:
        raise AssertionError(f"{path} was scanned")

    monkeypatch.setattr(index_file_module, "index_shard", refuse)
    dataset = ShardDataset(folder, resolution=8)
    assert dataset.fingerprint == expected.fingerprint
    assert [dataset.key(i) for i in range(23)] == [expected.key(i) for i in range(23)]
    assert (dataset[3, 3, 0]["image"] == expected[3, 3, 0]["image"]).all()


def test_a_shard_that_changed_is_scanned_again(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", good("a"))
    index_shards(path)
    write_tar(path, good("b"))
    os.utime(path, ns=(1, 1))
    assert read_index(path) is None
    assert open_index(path).keys == ("b",)
    index_shards(path)
    assert read_index(path) is not None
    assert read_index(path).keys == ("b",)


def test_a_shard_of_the_same_time_and_another_size_is_scanned_again(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", good("a"))
    index_shards(path)
    before = path.stat().st_mtime_ns
    write_tar(path, [*good("b"), *(member for i in range(9) for member in good(f"c{i}"))])
    os.utime(path, ns=(before, before))
    assert open_index(path).keys[0] == "b"


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign", "keys"])
def test_a_damaged_index_is_never_believed(tmp_path: Path, damage: str) -> None:
    path = write_tar(tmp_path / "x.tar", [*good("aaa"), *good("bbb")])
    index_shards(path)
    saved = index_path(path)
    content = saved.read_bytes()
    changed = {
        "cut": content[:-20],
        "flip": content.replace(b'"dtype"', b'"dtyqe"', 1),
        "empty": b"",
        "foreign": b"not safetensors at all" * 20,
        "keys": content.replace(b"aaa\0bbb", b"aab\0bbb"),
    }[damage]
    assert changed != content
    saved.write_bytes(changed)
    assert read_index(path) is None
    assert open_index(path).keys == ("aaa", "bbb")


def test_a_place_outside_the_shard_is_never_believed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", good("a"))
    index = index_shard(path)
    for offsets in (index.offsets + 10**9, index.offsets - 10**9):
        save_index(ShardIndex(path, index.keys, index.suffixes, offsets, index.sizes), stamp=stamp_of(path))
        assert read_index(path) is None


def test_the_contents_tell_each_shard(write_noise: WriteNoise) -> None:
    folder = write_noise(23)
    sums = index_shards(folder)
    told = json.loads((folder / CONTENTS).read_text())
    assert {name: told[name] for name in ("num_shards", "num_samples", "num_bad")} == {
        "num_shards": 4, "num_samples": 23, "num_bad": 0,
    }  # fmt: skip
    assert sums["num_samples"] == 23
    assert sums["unusable"] == []
    second = told["shards"][1]
    content = (folder / "00001.tar").read_bytes()
    assert second["sha256"] == hashlib.sha256(content).hexdigest()
    assert (second["name"], second["num_samples"], second["bytes"]) == ("00001.tar", 7, len(content))
    assert (second["first_key"], second["last_key"], second["suffixes"]) == (
        "000010000", "000010006", ["png", "txt", "json"],
    )  # fmt: skip


def test_bad_shards_and_samples_are_told_and_the_others_indexed(tmp_path: Path) -> None:
    expected = write_shard_faults(tmp_path)
    sums = index_shards(tmp_path, sha256=False)
    entries = read_contents(tmp_path)
    assert {(name, fault["key"], fault["kind"]) for name, entry in entries.items() for fault in entry.bad} == expected
    usable = {name for name, entry in entries.items() if entry.is_usable}
    assert usable == {f"{i:05d}.tar" for i in (1, 2, 6, 8, 9, 11)}
    assert {Path(path).name for path in sums["unusable"]} == set(entries) - usable
    assert [Path(path).name for path in sums["cut_off"]] == ["00001.tar"]
    assert entries["00001.tar"].num_samples == len(open_whole_samples(tmp_path / "00001.tar")[0]) > 0
    assert {path.name for path in tmp_path.glob("*.index.safetensors")} == {
        name.replace(".tar", ".index.safetensors") for name in usable - {"00001.tar"}
    }
    assert sums["num_bad"] == len(expected)


def test_what_has_not_changed_is_not_done_again(write_noise: WriteNoise) -> None:
    folder = write_noise(23)
    index_shards(folder)
    saved = {path: path.stat().st_mtime_ns for path in folder.glob("*.index.safetensors")}
    os.utime(folder / "00002.tar", ns=(5, 5))
    index_shards(folder, workers=2)
    again = {path: path.stat().st_mtime_ns for path in folder.glob("*.index.safetensors")}
    assert [path.name for path in saved if saved[path] != again[path]] == ["00002.index.safetensors"]
    index_shards(folder, force=True)
    assert all(path.stat().st_mtime_ns != again[path] for path in saved)


def test_a_hash_that_was_left_out_is_made_up_for(write_noise: WriteNoise) -> None:
    folder = write_noise(9)
    index_shards(folder, sha256=False)
    assert {entry.sha256 for entry in read_contents(folder).values()} == {None}
    index_shards(folder)
    assert None not in {entry.sha256 for entry in read_contents(folder).values()}


def test_contents_of_other_shards_in_the_folder_stay_and_of_lost_ones_go(write_noise: WriteNoise) -> None:
    folder = write_noise(23)
    index_shards(folder)
    (folder / "00003.tar").unlink()
    index_shards(folder / "00000.tar")
    assert list(read_contents(folder)) == ["00000.tar", "00001.tar", "00002.tar"]


def test_the_digest_is_of_the_samples_and_not_of_the_place(tmp_path: Path) -> None:
    members = [*good("a"), *good("b")]
    first, second = (write_tar(tmp_path / name, members) for name in ("x.tar", "y.tar"))
    other = write_tar(tmp_path / "z.tar", [*good("a"), *good("c")])
    digests: list[Any] = [index_shard(path).digest for path in (first, second, other)]
    assert digests[0] == digests[1] != digests[2]
    index = index_shard(first)
    assert index.select(np.array([1])).keys == ("b",)
    assert index.select(np.array([1])).digest != index.digest
    assert index.select(np.array([0, 1])).digest == index.digest
