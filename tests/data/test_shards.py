import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.data import CorruptSampleError, index_shard, resolve_shards
from ldm.data.shards import ShardReader, decode, decode_image, scan_members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


class RunsCode:
    """An object whose unpickling creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def write_tar(path: Path, members: list[tuple[str, bytes]], *, layout: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=layout) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=image_format, **options)
    return stream.getvalue()


names = st.text(st.sampled_from("abc/.é0"), min_size=1, max_size=12).filter(lambda name: name[-1] != "/")


@pytest.mark.parametrize("layout", FORMATS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=6), long=st.booleans())
def test_the_index_equals_tarfile(tmp_path: Path, layout: str, members: list[tuple[str, bytes]], long: bool) -> None:
    if long and layout != "ustar":
        members = [("x" * 130 + name, content) for name, content in members]
    path = write_tar(tmp_path / "x.tar", members, layout=FORMATS[layout])
    with tarfile.open(path) as tar:
        expected = [(entry.name, entry.offset_data, entry.size) for entry in tar if entry.isreg()]
    assert list(scan_members(path)) == expected


def test_ustar_prefixes_are_part_of_the_name(tmp_path: Path) -> None:
    name = "/".join(["folder" * 5] * 5) + "/000.txt"
    path = write_tar(tmp_path / "x.tar", [(name, b"hello")])
    assert index_shard(path).keys == (name.removesuffix(".txt"),)


def test_only_regular_files_are_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("a.txt", tarfile.SYMTYPE), ("b.txt", tarfile.DIRTYPE), ("c.txt", tarfile.REGTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/hostname"
            tar.addfile(entry)
    assert index_shard(tmp_path / "x.tar").keys == ("c",)


def test_samples_are_those_of_webdataset(tmp_path: Path) -> None:
    members = [("a/0.txt", b"0"), ("a/0.JPG", b"1"), ("a/0.seg.png", b"2"), ("./b.c/1.txt", b"3"), ("b.txt", b"4")]
    path = write_tar(tmp_path / "x.tar", members)
    ours = index_shard(path)
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert list(ours.keys) == [sample["__key__"] for sample in theirs]
    reader = ShardReader()
    for row, sample in enumerate(theirs):
        for suffix, place in ours.members(row).items():
            assert reader.read(path, *place) == sample[suffix]


def test_interleaved_members_find_their_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"A"), ("b.txt", b"B"), ("a.json", b"{}"), ("b.json", b"{}")])
    index = index_shard(path)
    assert index.keys == ("a", "b")
    assert [sorted(index.members(row)) for row in (0, 1)] == [["json", "txt"], ["json", "txt"]]


def test_a_member_given_twice_is_refused_by_shard_and_key(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"A"), ("a.txt", b"B")])
    with pytest.raises(ValueError, match=r"x\.tar: got a\.txt twice"):
        index_shard(path)


@pytest.mark.parametrize("cut", [700, 1100, 1536, 1800])
def test_a_truncated_tar_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"A" * 600), ("b.txt", b"B" * 600)])
    path.write_bytes(path.read_bytes()[:cut])
    if cut == 1536:  # whole members, as in tars joined end to end: tarfile takes it too
        assert index_shard(path).keys == ("a",)
    else:
        with pytest.raises(ValueError, match=r"x\.tar: got"):
            index_shard(path)


@pytest.mark.parametrize("content", [b"", b"<html>502 Bad Gateway</html>", b"\x1f\x8b" + bytes(range(1, 256)) * 4])
def test_what_is_not_a_tar_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.tar: got .* expected"):
        index_shard(tmp_path / "x.tar")


def test_a_pickle_member_is_never_run(tmp_path: Path) -> None:
    evil = pickle.dumps(RunsCode(tmp_path / "marker"))
    suffixes = ["pyd", "pickle", "pkl", "pth", "txt"]
    path = write_tar(tmp_path / "x.tar", [(f"a.{suffix}", evil if suffix != "txt" else b"A") for suffix in suffixes])
    index = index_shard(path)
    assert decode(index, 0, ShardReader(), suffixes=index.members(0)) == {"txt": "A"}
    assert not (tmp_path / "marker").exists()
    pickle.loads(evil)
    assert (tmp_path / "marker").exists(), "the payload must be able to do harm for this test to mean anything"


def test_an_array_with_pickled_objects_is_refused_unread(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([RunsCode(tmp_path / "marker")], dtype=object), allow_pickle=True)
    index = index_shard(write_tar(tmp_path / "x.tar", [("a.npy", stream.getvalue())]))
    with pytest.raises(CorruptSampleError, match=r"x\.tar: a\.npy"):
        decode(index, 0, ShardReader(), suffixes=["npy"])
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("k7.png", encode(Image.effect_noise((64, 64), 50))[:900]),
        ("k7.jpg", b"not an image"),
        ("k7.jpg", encode(Image.effect_noise((64, 64), 50), "JPEG")[:900]),
        ("k7.json", b"{'single': quotes}"),
        ("k7.json", b"[1, 2]"),
        ("k7.txt", b"\xff\xfe"),
    ],
)
def test_a_damaged_member_is_named_by_shard_and_key(tmp_path: Path, name: str, content: bytes) -> None:
    index = index_shard(write_tar(tmp_path / "x.tar", [(name, content)]))
    with pytest.raises(CorruptSampleError, match=rf"x\.tar: {name} cannot be decoded"):
        decode(index, 0, ShardReader(), suffixes=index.members(0))


def test_an_image_bomb_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ValueError, match=r"got 9000 x 9000 pixels"):
        decode_image(encode(Image.new("1", (9000, 9000))))


@pytest.mark.parametrize(
    ("image", "image_format", "expected"),
    [
        (Image.new("L", (2, 2), 90), "PNG", (90, 90, 90)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), "PNG", (255, 0, 0)),
        (Image.new("RGB", (2, 2), (0, 0, 255)).quantize(2), "PNG", (0, 0, 255)),
        (Image.new("I;16", (2, 2), 128 * 257), "PNG", (128, 128, 128)),
        (Image.new("CMYK", (2, 2), (0, 0, 0, 255)), "JPEG", (0, 0, 0)),
        (Image.new("RGB", (2, 2), (10, 20, 30)), "WEBP", (10, 20, 30)),
    ],
)
def test_every_kind_of_image_becomes_rgb(image: Image.Image, image_format: str, expected: tuple[int, int, int]) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {}
    decoded = decode_image(encode(image, image_format, **options))
    assert decoded.mode == "RGB"
    assert decoded.getpixel((0, 0)) == expected


def test_a_photograph_taken_sideways_is_turned_upright() -> None:
    image = Image.new("RGB", (16, 8))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    assert decode_image(encode(image, "JPEG", exif=exif)).size == (8, 16)


def test_more_shards_than_open_files_are_read(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{i}.tar", [("a.txt", str(i).encode())]) for i in range(5)]
    reader = ShardReader(limit=2)
    for i in (0, 1, 2, 3, 4, 0, 3):
        index = index_shard(paths[i])
        assert decode(index, 0, reader, suffixes=["txt"]) == {"txt": str(i)}


def test_folders_globs_braces_and_lists_name_shards(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{i:05d}.tar", []) for i in range(3)]
    assert resolve_shards(tmp_path) == paths
    assert resolve_shards(f"{tmp_path}/*.tar") == paths
    assert resolve_shards(f"{tmp_path}/{{00000..00002}}.tar") == paths
    assert resolve_shards([str(paths[2]), str(paths[0])]) == [paths[2], paths[0]]


def test_missing_shards_are_named_in_one_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [])
    for spec in (f"{tmp_path}/{{00000..00001}}.tar", f"{tmp_path}/nowhere", f"{tmp_path}/*.tgz"):
        with pytest.raises(FileNotFoundError, match=r"^shards: got .*, expected [^\n]*$"):
            resolve_shards(spec)


def test_a_shard_named_twice_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "00000.tar", [])
    with pytest.raises(ValueError, match="more than once"):
        resolve_shards([str(path), str(tmp_path)])


@pytest.mark.parametrize("url", ["pipe:touch marker", "s3://bucket/00000.tar"])
def test_pipes_and_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected local tar files"):
        resolve_shards(url)


def test_a_reader_that_outlives_its_modules_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"content")
    reader = ShardReader()
    reader.read(tmp_path / "file", 0, 7)
    with monkeypatch.context() as patch:
        patch.setattr("ldm.data.shards.os", None)  # as while Python ends
        reader.__del__()
    reader.close()
