"""From the bytes of pictures to the pixels of batches."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_shards import encode, write_tar

from ldm.data import Record, ShardDataModule, ShardDataset, write_shards
from ldm.data.batches import assemble, to_numbers
from ldm.data.jpeg import decode_pixels, halving
from ldm.data.transforms import cover, mirror, resize


def photograph(width: int, height: int) -> Image.Image:
    """Smooth colours with edges and grain, of which resizing has something to get wrong."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), 3)
    grain = random.normal(0, 8, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **({"quality": 90} | options))
    return stream.getvalue()


@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_jpeg_has_the_very_pixels_that_pillow_decodes(subsampling: int) -> None:
    for image in (photograph(61, 43), photograph(61, 43).convert("L")):
        content = jpeg(image, **({"subsampling": subsampling} if image.mode == "RGB" else {}))
        pixels, size = decode_pixels(content)
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
        assert size == (61, 43)


def test_what_is_no_plain_jpeg_is_left_to_pillow() -> None:
    upright = photograph(20, 12)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert decode_pixels(jpeg(upright, exif=exif))[1] == (12, 20)
    exif[0x0112] = 1
    assert decode_pixels(jpeg(upright, exif=exif))[1] == (20, 12)
    for image in (Image.new("CMYK", (8, 8), (0, 255, 255, 0)),):
        pixels, _ = decode_pixels(jpeg(image))
        expected = Image.open(io.BytesIO(jpeg(image))).convert("RGB")
        np.testing.assert_array_equal(pixels, np.asarray(expected))
    with pytest.raises(OSError, match="truncated"):
        decode_pixels(jpeg(photograph(64, 64))[:700])


@pytest.mark.parametrize("size", [(96, 64), (61, 150), (64, 64), (33, 33)])
def test_scaled_pixels_are_within_one_level_of_pillows_bicubic(size: tuple[int, int]) -> None:
    image = photograph(200, 150)
    expected = np.asarray(image.resize(size, Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(resize(np.asarray(image), size).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("size", "target", "factor"),
    [((100, 100), (51, 51), 1), ((100, 100), (50, 50), 2), ((100, 900), (50, 50), 2), ((800, 801), (100, 100), 8)],
)
def test_pictures_are_halved_as_often_as_they_cover_the_target(
    size: tuple[int, int], target: tuple[int, int], factor: int
) -> None:
    assert halving(size, target) == factor
    pixels, own = decode_pixels(jpeg(photograph(*size)), fit=lambda _: target)
    assert own == size
    assert pixels.shape[:2] == (-(-size[1] // factor), -(-size[0] // factor))


def test_decoding_at_a_half_changes_pixels_a_little_and_only_where_a_half_is_enough(tmp_path: Path) -> None:
    for i, side in enumerate((130, 60)):
        (tmp_path / str(i)).mkdir()
        write_tar(tmp_path / str(i) / "0.tar", [("a.jpg", jpeg(photograph(side, side)))])
    for i, expected in enumerate(([1, 10], [0, 0])):
        exact, scaled = (
            ShardDataset(tmp_path / str(i), resolution=32, exact_decoding=flag)[0, 0, 0]["image"]
            for flag in (True, False)
        )
        difference = (127.5 * (exact - scaled)).abs()
        assert expected[0] <= difference.max()
        assert difference.mean() <= expected[1]


def test_a_batch_is_bytes_until_the_device_and_then_the_same_numbers(tmp_path: Path) -> None:
    write_shards(tmp_path, [Record(photograph(16, 12), f"{i}") for i in range(3)])
    dataset = ShardDataset(tmp_path, resolution=8, flip=True)
    batch = assemble((dataset.read((i, i, 0)) for i in range(3)), 3)
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].permute(0, 2, 3, 1).is_contiguous()
    numbers = to_numbers(batch)["image"]
    assert numbers.is_contiguous()
    assert torch.equal(numbers, torch.stack([dataset[i, i, 0]["image"] for i in range(3)]))
    np.testing.assert_array_equal(mirror(np.arange(12).reshape(2, 2, 3)), np.arange(12).reshape(2, 2, 3)[:, ::-1])


def test_a_batch_of_two_shapes_is_refused() -> None:
    items = [{"image": np.zeros((4, 4, 3), np.uint8)}, {"image": np.zeros((4, 5, 3), np.uint8)}]
    with pytest.raises(ValueError, match=r"^image: got \(4, 5, 3\) and \(4, 4, 3\) in one batch"):
        assemble(items, 2)


@pytest.mark.parametrize(("workers", "kind"), [(2, "threads"), (2, "processes")])
def test_workers_of_either_kind_read_the_batches_that_none_reads(tmp_path: Path, workers: int, kind: str) -> None:
    write_shards(tmp_path, [Record(photograph(16 + i, 12), f"{i}") for i in range(13)], samples_per_shard=4)
    options: dict[str, Any] = {"batch_size": 4, "resolution": 8, "columns": ["width", "crop_left"]}
    alone, shared = (
        list(ShardDataModule(tmp_path, **options, num_workers=n, workers=kind).iterate_once("train", 3))
        for n in (0, workers)
    )
    assert [batch["caption"] for batch in alone] == [batch["caption"] for batch in shared]
    for one, other in zip(alone, shared, strict=True):
        for name in ("image", "width", "crop_left", "index", "position"):
            assert torch.equal(one[name], other[name])


def test_the_batch_says_where_pictures_were_cut_as_sdxl_is_told(tmp_path: Path) -> None:
    names = ["original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width"]
    write_shards(tmp_path, [Record(photograph(20, 10), "a", original_size=(400, 200))])
    (tmp_path / "bare").mkdir()
    write_tar(tmp_path / "bare" / "0.tar", [("a.png", encode(photograph(11, 22))), ("a.txt", b"b")])
    stated, own = (ShardDataset(folder, resolution=5, columns=names) for folder in (tmp_path, tmp_path / "bare"))
    assert [stated[0, 0, 0][name] for name in names] == [200, 400, 0, 2, 5, 5]
    assert [own[0, 0, 0][name] for name in names] == [22, 11, 2, 0, 5, 5]
    (tmp_path / "table").mkdir()
    row = b'{"original_height": 200.0, "original_width": 400.0}'  # as tables with nulls have it
    write_tar(tmp_path / "table" / "0.tar", [("a.png", encode(photograph(20, 10))), ("a.json", row)])
    assert [ShardDataset(tmp_path / "table", resolution=5, columns=names)[0, 0, 0][name] for name in names[:2]] == [
        200,
        400,
    ]
    mirrored = ShardDataset(tmp_path, resolution=5, columns=names, flip=True)
    assert {mirrored[0, 0, epoch]["crop_left"] for epoch in range(20)} == {2, 3}


def test_the_class_of_a_cls_member_is_a_column(tmp_path: Path) -> None:
    members = [
        (f"{i}.{suffix}", data)
        for i in range(2)
        for suffix, data in (("png", encode(Image.new("RGB", (4, 4)))), ("cls", b"%d" % (7 * i)))
    ]
    write_tar(tmp_path / "0.tar", members)
    dataset = ShardDataset(tmp_path, resolution=4, columns=["cls"])
    assert [dataset[i, i, 0]["cls"] for i in range(2)] == [0, 7]


def test_cover_is_the_smallest_size_in_proportion() -> None:
    assert cover((200, 100), (50, 50)) == (100, 50)
    assert cover((100, 200), (60, 20)) == (60, 120)
