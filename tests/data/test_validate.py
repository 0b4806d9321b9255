import json
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from fault_shards import Touches, encode, good, image_bomb, noise, write_fault_set, write_tar

from ldm.data import CorruptSampleError, ShardDataset, write_shards
from ldm.data.encoded import EncodedSample, EncodedShard
from ldm.data.faults import KINDS, OF_READING, Fault, header_faults
from ldm.data.readable import drop_without_payload
from ldm.data.shards import ShardReader, decode, index_shard
from ldm.data.validate import Checks, check_image, validate_shards

PEAK = """
import resource, sys
from ldm.data.validate import validate_shards
from ldm.data.shards import decode_image
import PIL.JpegImagePlugin, PIL.PngImagePlugin, PIL.WebPImagePlugin
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = len(validate_shards(sys.argv[1]).faults)
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


# Not of one sample, whose members tell the fault by themselves.
OF_SHARDS = (
    *("empty_file", "not_a_tar", "broken_tar", "truncated_tar", "no_end_marker", "no_samples"),
    *("wrong_count", "repeated_member", "interleaved_key", "unsafe_key", "not_a_file", "dotted_key"),
)


def found(faults: list[Fault]) -> set[tuple[str, str, str]]:
    return {(Path(fault.shard).name, fault.key, fault.kind) for fault in faults}


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marker") / "touched"


@pytest.fixture(scope="module")
def fault_set(tmp_path_factory: pytest.TempPathFactory, marker: Path) -> tuple[Path, set[tuple[str, str, str]]]:
    folder = tmp_path_factory.mktemp("faults")
    return folder, write_fault_set(folder, marker)


def test_every_fault_is_found_by_shard_key_and_kind_and_no_other(
    fault_set: tuple[Path, set[tuple[str, str, str]]], marker: Path
) -> None:
    folder, expected = fault_set
    verdict = validate_shards(folder)
    assert found(verdict.faults) == expected
    assert len(verdict.faults) == len(expected)
    assert verdict.num_shards == 12
    assert set(verdict.counts) == set(KINDS) - {"wrong_count", *OF_READING}
    assert not marker.exists()
    pickle.loads(pickle.dumps(Touches(marker)))
    assert marker.exists(), "the payload must be able to do harm for this test to mean anything"
    marker.unlink()


def test_bombs_take_no_memory(fault_set: tuple[Path, set[tuple[str, str, str]]]) -> None:
    folder, expected = fault_set
    done = subprocess.run([sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, timeout=120)
    count, megabytes = done.stdout.split()
    assert int(count) == len(expected), done.stderr
    assert float(megabytes) < 50


def test_workers_find_the_same_in_the_same_order(fault_set: tuple[Path, set[tuple[str, str, str]]]) -> None:
    shards = [str(fault_set[0] / f"{i:05d}.tar") for i in range(1, 12)]
    assert validate_shards(shards, workers=2) == validate_shards(shards)


def test_progress_tells_each_shard(fault_set: tuple[Path, set[tuple[str, str, str]]]) -> None:
    told = []
    shards = [str(fault_set[0] / f"{i:05d}.tar") for i in (3, 4)]
    validate_shards(shards, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (*OF_SHARDS, *OF_READING)])
def test_the_outcome_is_what_training_does(
    kind: str, tmp_path: Path, fault_set: tuple[Path, set[tuple[str, str, str]]]
) -> None:
    with tarfile.open(fault_set[0] / "00000.tar") as tar:
        members = [(entry.name, tar.extractfile(entry).read()) for entry in tar if entry.name.startswith(f"{kind}.")]
    write_tar(tmp_path / "0.tar", members)
    if KINDS[kind].outcome != "skipped":
        assert ShardDataset(tmp_path, resolution=8)[0, 0, 0]["image"].shape == (3, 8, 8)
        return
    index = index_shard(tmp_path / "0.tar")
    if kind == "no_image":
        assert [fault.kind for fault in drop_without_payload(index)[1]] == ["no_image"]
        return
    with pytest.raises(CorruptSampleError, match=rf"0\.tar: {kind}\.\w+ cannot be decoded") as caught:
        decode(index, 0, ShardReader(), suffixes=index.suffixes)
    assert caught.value.kind == kind


@pytest.mark.parametrize("kind", ["empty_file", "not_a_tar", "broken_tar", "repeated_member"])
def test_a_shard_that_cannot_be_read_is_refused_in_training(
    kind: str, fault_set: tuple[Path, set[tuple[str, str, str]]]
) -> None:
    names = {name for name, _, found_kind in fault_set[1] if found_kind == kind}
    for name in names:
        with pytest.raises(ValueError, match=name):
            ShardDataset(fault_set[0] / name, resolution=8)


def test_an_oversized_member_is_refused_unread(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", good("a", json=b'{"a": "' + b"x" * 2**23 + b'"}'))
    index = index_shard(tmp_path / "0.tar")
    tracemalloc.start()
    with pytest.raises(
        CorruptSampleError, match=r"a\.json cannot be decoded \(got \d+ bytes, expected at most 4194304"
    ):
        decode(index, 0, ShardReader(), suffixes=["json"])
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_shard_with_another_count_than_its_manifest_states_is_found(tmp_path: Path) -> None:
    from ldm.data import Record

    write_shards(tmp_path, [Record(noise(), "a"), Record(noise(), "b")])
    write_tar(tmp_path / "00000.tar", good("a"))
    assert found(validate_shards(tmp_path).faults) == {("00000.tar", "", "wrong_count")}


def test_good_shards_have_no_fault(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [*good("a/0"), *good("a/1"), *good("b", txt=None, json=b'{"caption": "c"}')])
    verdict = validate_shards(tmp_path)
    assert verdict.faults == []
    assert verdict.num_samples == 3


def test_members_that_nobody_reads_are_no_fault(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [*good("a"), ("a.seg.png", b"whatever"), ("a.cls", b"3"), ("README", b"")])
    assert validate_shards(tmp_path).faults == []


def test_without_decoding_only_headers_of_images_are_looked_at(tmp_path: Path) -> None:
    whole = encode(noise(size=(64, 64)), "JPEG")
    half = whole[: len(whole) // 2]
    assert [kind for kind, _ in check_image(half, Checks())] == ["broken_image"]
    assert list(check_image(half, Checks(decode=False))) == []
    assert [kind for kind, _ in check_image(image_bomb(), Checks(decode=False))] == ["image_bomb"]


def test_the_least_side_is_a_setting() -> None:
    picture = encode(noise(size=(30, 16)))
    assert list(check_image(picture, Checks(min_side=16))) == []
    assert [kind for kind, _ in check_image(picture, Checks(min_side=17))] == ["tiny_image"]
    with pytest.raises(ValueError, match="min_side: got 0"):
        Checks(min_side=0)


def test_grey_with_16_bits_is_found_too() -> None:
    from PIL import Image

    assert [kind for kind, _ in check_image(encode(Image.new("I;16", (4, 4))), Checks())] == ["sixteen_bit"]


def test_a_key_is_told_once_as_unsafe(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [*good("/etc/a"), *good("b\\c")])
    _, faults = header_faults(tmp_path / "0.tar")
    assert [(fault.key, fault.kind) for fault in faults] == [("/etc/a", "unsafe_key"), ("b\\c", "unsafe_key")]


def test_two_dots_inside_a_name_lead_nowhere(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a/b..c/d.jpg", encode(noise(), "JPEG")), ("a/b..c/d.txt", b"x")])
    assert header_faults(tmp_path / "0.tar")[1] == []


def header(name: str, *, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with a right sum and any bytes for a size."""
    content = bytearray(512)
    content[: len(name)], content[124 : 124 + len(size)], content[156:157] = name.encode(), size, kind
    content[257:265] = b"ustar\x0000"
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content)
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        header("a.txt", size=b"-1000"),
        header("a.txt", size=b"\xff" * 12),
        header("x", size=b"10", kind=b"x") + b"0 path=a\n".ljust(512, b"\0"),
        header("x", size=b"20", kind=b"x") + b"14 size=-512\n".ljust(512, b"\0") + header("a.txt", size=b"1"),
        header("x", size=b"20", kind=b"x") + b"99999 path=a\n".ljust(512, b"\0"),
        header("x", size=b"77777777", kind=b"L") + bytes(2**24),
    ],
)
def test_headers_made_to_mislead_end_as_broken_shards(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(header("good.txt", size=b"0") + content + bytes(1024))
    index, faults = header_faults(tmp_path / "0.tar")
    assert index is None
    assert [fault.kind for fault in faults] in (["broken_tar"], ["truncated_tar"])


def test_everything_goes_into_json(fault_set: tuple[Path, set[tuple[str, str, str]]]) -> None:
    verdict = validate_shards(str(fault_set[0] / "00003.tar"))
    told = json.loads(json.dumps(verdict.as_json()))
    assert told["counts"] == {"empty_file": 1}
    assert told["faults"][0]["kind"] == "empty_file"
    assert told["num_shards"] == 1


def test_moments_of_two_encoders_in_one_shard_are_found(tmp_path: Path) -> None:
    with EncodedShard(tmp_path, "00000.tar", {}) as shard:
        for key, encoder in (("a", "1"), ("b", "2"), ("c", "1")):
            row = {"key": key, "encoder_sha256": encoder}
            shard.add(EncodedSample(key, "caption", row, np.zeros((2, 1, 1), np.float32)))
        shard.finish(bad=[])
    verdict = validate_shards(tmp_path)
    assert [(fault.key, fault.kind) for fault in verdict.faults] == [("b", "foreign_moments")]


def test_moments_of_another_encoder_in_another_shard_are_found(tmp_path: Path) -> None:
    for name, encoder in (("00000.tar", "1"), ("00001.tar", "2")):
        with EncodedShard(tmp_path, name, {}) as shard:
            row = {"encoder_sha256": encoder}
            shard.add(EncodedSample(name[:5], "caption", row, np.zeros((2, 1, 1), np.float32)))
            shard.finish(bad=[])
    verdict = validate_shards(tmp_path)
    assert [(Path(fault.shard).name, fault.kind) for fault in verdict.faults] == [("00001.tar", "foreign_moments")]
