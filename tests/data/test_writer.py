import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from ldm.data import LatentRecord, Record, ShardDataset, read_manifest, write_latent_shards, write_shards


def records(count: int) -> Iterator[Record]:
    pixels = np.random.default_rng(1).integers(0, 256, (count, 6, 9, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        yield Record(image, f"caption {i} é", {"aesthetic": 5.5, "number": i}, original_size=(90, 60))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar}


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_the_same_records_give_the_same_bytes(tmp_path: Path, image_format: str) -> None:
    for name in ("a", "b"):
        write_shards(tmp_path / name, records(5), samples_per_shard=2, image_format=image_format)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(contents(tmp_path / "a")) == ["00000.tar", "00001.tar", "00002.tar", "manifest.json"]


def test_members_are_named_and_described_as_img2dataset_does(tmp_path: Path) -> None:
    write_shards(tmp_path, records(3), samples_per_shard=2)
    found = members(tmp_path / "00001.tar")
    assert sorted(found) == ["000010000.json", "000010000.png", "000010000.txt"]
    assert found["000010000.txt"].decode() == "caption 2 é"
    assert json.loads(found["000010000.json"]) == {
        "key": "000010000",
        "caption": "caption 2 é",
        "width": 9,
        "height": 6,
        "original_width": 90,
        "original_height": 60,
        "sha256": hashlib.sha256(found["000010000.png"]).hexdigest(),
        "status": "success",
        "aesthetic": 5.5,
        "number": 2,
    }


def test_webdataset_reads_what_was_written(tmp_path: Path) -> None:
    write_shards(tmp_path, records(5), samples_per_shard=2)
    url = f"{tmp_path}/{{00000..00002}}.tar"
    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode("rgb8"))
    assert [sample["txt"] for sample in samples] == [record.caption for record in records(5)]
    for sample, record in zip(samples, records(5), strict=True):
        np.testing.assert_array_equal(sample["png"], record.image)


def test_the_manifest_states_every_shard(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path, records(5), samples_per_shard=2)
    assert read_manifest(tmp_path) == manifest
    assert manifest["num_samples"] == 5
    assert manifest["columns"] == ["aesthetic", "number"]
    assert [shard["num_samples"] for shard in manifest["shards"]] == [2, 2, 1]
    for shard in manifest["shards"]:
        content = (tmp_path / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_encoded_images_are_stored_as_they_are(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (5, 4)).save(stream, format="WEBP")
    write_shards(tmp_path, [Record(stream.getvalue(), "x")])
    assert members(tmp_path / "00000.tar")["000000000.webp"] == stream.getvalue()


def test_an_interrupted_set_has_no_manifest_and_is_not_read(tmp_path: Path) -> None:
    def breaks_off() -> Iterator[Record]:
        yield from records(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "set", breaks_off(), samples_per_shard=2)
    assert (tmp_path / "set" / "00000.tar").exists()
    assert read_manifest(tmp_path / "set") is None
    with pytest.raises(ValueError, match="got an unfinished set of shards"):
        ShardDataset(tmp_path / "set", resolution=6)


def test_writing_again_after_an_interruption_gives_the_whole_set(tmp_path: Path) -> None:
    def breaks_off() -> Iterator[Record]:
        yield from records(9)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "a", breaks_off(), samples_per_shard=2)
    for name in ("a", "b"):
        write_shards(tmp_path / name, records(3), samples_per_shard=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_shards_of_others_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"holds 00000\.tar without manifest\.json; choose an empty folder"):
        write_shards(tmp_path, records(1))
    assert contents(tmp_path) == {"00000.tar": b"precious"}


def test_latent_shards_state_their_encoder_everywhere(tmp_path: Path) -> None:
    moments = np.random.default_rng(0).normal(size=(3, 8, 2, 2)).astype(np.float32)
    rows = [LatentRecord(array, f"c{i}", {"digit": i}) for i, array in enumerate(moments)]
    manifest = write_latent_shards(tmp_path, rows, encoder_sha256="abc", samples_per_shard=2)
    assert manifest["encoder_sha256"] == "abc"
    found = members(tmp_path / "00000.tar") | members(tmp_path / "00001.tar")
    assert {json.loads(found[name])["encoder_sha256"] for name in found if name.endswith("json")} == {"abc"}
    np.testing.assert_array_equal(np.load(io.BytesIO(found["000010000.npy"])), moments[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_format": "gif"}, r"got 'gif', expected one of \['jpg', 'png', 'webp'\]"),
        ({"quality": 101}, "quality: got 101, expected 1 to 100"),
        ({"samples_per_shard": 0}, "expected 1 to 10000"),
        ({"samples_per_shard": 10_001}, "expected 1 to 10000"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path / "set", records(1), **options)
    assert not (tmp_path / "set").exists()


def test_no_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got none to write"):
        write_shards(tmp_path, [])


def test_columns_may_not_hide_the_writers_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"columns: got \['width'\]"):
        write_shards(tmp_path, [Record(np.zeros((2, 2, 3), np.uint8), "x", {"width": 3})])


def test_moments_of_a_whole_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got shape \(1, 3, 2, 2\), expected \(M, h, w\)"):
        write_latent_shards(tmp_path, [LatentRecord(np.zeros((1, 3, 2, 2)), "x")], encoder_sha256="abc")
