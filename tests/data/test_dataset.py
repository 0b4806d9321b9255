import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_shards import encode, write_tar

from ldm.data import CorruptSampleError, LatentRecord, Record, ShardDataset, collate, write_latent_shards, write_shards
from ldm.data.augmentation import Augmentation
from ldm.data.buckets import Buckets
from ldm.data.masks import RandomMask
from ldm.data.transforms import resize_and_crop

WriteNoise = Callable[..., Path]


def encode_npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def write_latents(folder: Path, *, encoder: str = "abc", count: int = 3) -> Path:
    moments = np.random.default_rng(0).normal(size=(count, 8, 2, 2)).astype(np.float32)
    rows = [LatentRecord(array, f"c{i}", {"digit": i}) for i, array in enumerate(moments)]
    write_latent_shards(folder, rows, encoder_sha256=encoder)
    return folder


def test_three_samples_make_a_batch_as_the_contract_says(tmp_path: Path) -> None:
    shades = [0, 128, 255]
    rows = [Record(np.full((4, 4, 3), v, np.uint8), f"shade {v}", {"shade": v, "score": v / 2}) for v in shades]
    write_shards(tmp_path, rows)
    dataset = ShardDataset(tmp_path, resolution=4, columns=["shade", "score"])
    batch = collate([dataset[100 + i, i, 0] for i in (2, 0, 1)])
    assert sorted(batch) == ["caption", "image", "index", "position", "score", "shade"]
    assert batch["caption"] == ["shade 255", "shade 0", "shade 128"]
    expected = torch.tensor([1.0, -1.0, 128 / 127.5 - 1]).reshape(3, 1, 1, 1).expand(3, 3, 4, 4)
    torch.testing.assert_close(batch["image"], expected)
    assert batch["image"].is_contiguous()
    for name, values in {"index": [2, 0, 1], "position": [102, 100, 101], "shade": [255, 0, 128]}.items():
        torch.testing.assert_close(batch[name], torch.tensor(values, dtype=torch.int64))
    torch.testing.assert_close(batch["score"], torch.tensor([127.5, 0.0, 64.0]))


def test_latents_make_a_batch_as_the_contract_says(tmp_path: Path) -> None:
    dataset = ShardDataset(write_latents(tmp_path), columns=["digit"])
    batch = collate([dataset[i, i, 0] for i in range(3)])
    expected = np.random.default_rng(0).normal(size=(3, 8, 2, 2)).astype(np.float32)
    torch.testing.assert_close(batch["moments"], torch.from_numpy(expected))
    assert batch["caption"] == ["c0", "c1", "c2"]
    assert batch["digit"].tolist() == [0, 1, 2]
    assert "image" not in batch
    assert dataset.encoder_sha256 == "abc"


def test_samples_are_numbered_through_the_shards(write_noise: WriteNoise) -> None:
    dataset = ShardDataset(write_noise(17), resolution=8, columns=["number"])
    assert [dataset[0, i, 0]["number"] for i in range(len(dataset))] == list(range(17))


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_and_crop(Image.fromarray(pixels), 16), pixels)


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (33, 32), (7, 5), (3000, 40)])
def test_the_short_side_is_scaled_and_the_centre_kept(size: tuple[int, int]) -> None:
    width, height = size
    image = Image.new("RGB", size, "red")
    side = min(size)
    image.paste("blue", ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2))
    cropped = resize_and_crop(image, 16)
    assert cropped.shape == (16, 16, 3)
    assert np.unique(cropped[2:-2, 2:-2].reshape(-1, 3), axis=0).tolist() == [[0, 0, 255]]


def test_shrinking_averages_instead_of_picking_pixels() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize_and_crop(Image.fromarray(stripes), 8)[:, 1:-1].astype(int) - 128).max() <= 1


def test_mirroring_depends_on_seed_epoch_and_sample_alone(write_noise: WriteNoise) -> None:
    folder = write_noise(20)
    plain = ShardDataset(folder, resolution=8)
    flips = {}
    for seed in (0, 1):
        dataset = ShardDataset(folder, resolution=8, flip=True, seed=seed)
        for epoch in (0, 1):
            # Reading backwards and from another place in the stream changes nothing.
            images = {i: dataset[7 * i, i, epoch]["image"] for i in reversed(range(20))}
            again = [dataset[i, i, epoch]["image"] for i in range(20)]
            for i in range(20):
                torch.testing.assert_close(images[i], again[i], rtol=0, atol=0)
            flips[seed, epoch] = [not torch.equal(images[i], plain[i, i, 0]["image"]) for i in range(20)]
            for i in range(20):
                expected = plain[i, i, 0]["image"]
                torch.testing.assert_close(images[i], expected.flip(-1) if flips[seed, epoch][i] else expected)
    assert len({tuple(pattern) for pattern in flips.values()}) == 4
    assert 20 < sum(sum(pattern) for pattern in flips.values()) < 60


def test_a_pass_without_augmentation_mirrors_nothing(write_noise: WriteNoise) -> None:
    folder = write_noise(20)
    plain, flipped = (ShardDataset(folder, resolution=8, flip=flip) for flip in (False, True))
    for i in range(20):
        torch.testing.assert_close(flipped.unaugmented()[i, i, 0]["image"], plain[i, i, 0]["image"], rtol=0, atol=0)


def test_the_cache_changes_no_batch(write_noise: WriteNoise) -> None:
    folder = write_noise(10)
    plain, cached = (
        ShardDataset(folder, resolution=8, columns=["number"], flip=True, cache=cache) for cache in (False, True)
    )
    for epoch in range(3):
        expected, got = (collate([dataset[i, i, epoch] for i in range(10)]) for dataset in (plain, cached))
        assert expected["caption"] == got["caption"]
        for name in ("image", "number", "index", "position"):
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0)


def test_a_pass_through_cached_latents_leaves_training_its_mirrored_ones(tmp_path: Path) -> None:
    arrays = [(name, encode_npy(np.full((8, 2, 2), i, np.float32))) for i, name in enumerate(("0.npy", "0.flip.npy"))]
    write_tar(tmp_path / "0.tar", [*arrays, ("0.json", b'{"encoder_sha256": "abc"}')])
    dataset = ShardDataset(tmp_path, flip=True, cache=True)
    assert dataset.unaugmented()[0, 0, 0]["moments"].unique().tolist() == [0]
    assert {dataset[0, 0, epoch]["moments"].mean().item() for epoch in range(8)} == {0, 1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("augmentation", Augmentation(crop="random", flip=True)),
        ("derive", RandomMask()),
        ("buckets", Buckets([[2, 2]])),
    ],
)
def test_what_is_done_to_pictures_is_refused_for_latents(name: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"data\.{name}: got .* for shards of moments, .* expected null"):
        ShardDataset(write_latents(tmp_path), **{name: value})


@pytest.mark.parametrize("caption", ["NaN", "null", '""'])
def test_a_caption_that_the_json_has_as_none_is_empty(caption: str, tmp_path: Path) -> None:
    row = f'{{"caption": {caption}, "long": [{caption}, "a cat"]}}'.encode()
    write_tar(tmp_path / "0.tar", [("0.png", encode(Image.new("RGB", (8, 8)))), ("0.json", row)])
    assert ShardDataset(tmp_path, resolution=8)[0, 0, 0]["caption"] == ""
    assert ShardDataset(tmp_path, resolution=8).annotation(0)[0] == ""
    chosen = ShardDataset(tmp_path, resolution=8, captions={"long": 1})
    assert {chosen[0, 0, epoch]["caption"] for epoch in range(8)} == {"a cat"}


def test_an_annotation_says_what_a_pass_reads(tmp_path: Path) -> None:
    row = json.dumps({"long": ["a cat asleep", "a sleeping cat"], "AESTHETIC_SCORE": 5.5}).encode()
    members = [("0.png", encode(Image.new("RGB", (8, 8)))), ("0.txt", b"cat"), ("0.json", row), ("0.cls", b"3")]
    write_tar(tmp_path / "0.tar", members)
    dataset = ShardDataset(tmp_path, resolution=8, columns=["cls", "aesthetic"], captions={"long": 1}).unaugmented()
    item = dataset[0, 0, 0]
    assert dataset.annotation(0) == (item["caption"], {"cls": 3, "aesthetic": 5.5})
    assert (item["cls"], item["aesthetic"]) == (3, 5.5)
    assert len(item["caption"]) > len("cat")


def test_cached_samples_are_not_read_again(write_noise: WriteNoise) -> None:
    folder = write_noise(10)
    dataset = ShardDataset(folder, resolution=8, cache=True)
    first = collate([dataset[i, i, 0] for i in range(10)])
    dataset._reader.close()
    shutil.rmtree(folder)
    second = collate([dataset[i, i, 0] for i in range(10)])
    torch.testing.assert_close(second["image"], first["image"], rtol=0, atol=0)


def test_writing_into_a_batch_leaves_the_cache_alone(tmp_path: Path, write_noise: WriteNoise) -> None:
    for dataset, name in (
        (ShardDataset(write_noise(1), resolution=8, cache=True), "image"),
        (ShardDataset(write_latents(tmp_path / "latents"), cache=True), "moments"),
    ):
        before = collate([dataset[0, 0, 0]])[name].clone()
        collate([dataset[0, 0, 0]])[name].zero_()
        torch.testing.assert_close(collate([dataset[0, 0, 0]])[name], before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"txt": b"from txt", "json": b'{"caption": "from json"}'}, "from txt"),
        ({"json": b'{"caption": "from json"}'}, "from json"),
        ({"json": b'{"caption": null}'}, ""),
        ({}, ""),
    ],
)
def test_the_caption_is_the_text_else_that_of_the_json(
    tmp_path: Path, members: dict[str, bytes], expected: str
) -> None:
    members = {"png": encode(Image.new("RGB", (4, 4))), **members}
    write_tar(tmp_path / "0.tar", [(f"a.{suffix}", content) for suffix, content in members.items()])
    assert ShardDataset(tmp_path, resolution=4)[0, 0, 0]["caption"] == expected


def test_a_missing_column_names_those_that_are_there(write_noise: WriteNoise) -> None:
    with pytest.raises(ValueError, match=r"columns: got \['aesthetic'\], expected some of \[.*'number'.*\]"):
        ShardDataset(write_noise(3), resolution=8, columns=["aesthetic"])


@pytest.mark.parametrize("spelt", ["AESTHETIC", "aesthetic_score"])
def test_columns_are_found_under_the_names_that_published_sets_give_them(tmp_path: Path, spelt: str) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    write_shards(tmp_path, [Record(pixels, "", {spelt: 5.5}), Record(pixels, "", {"aesthetic": 6})])
    dataset = ShardDataset(tmp_path, resolution=4, columns=["aesthetic"])
    assert [dataset[i, i, 0]["aesthetic"] for i in range(2)] == [5.5, 6]


@pytest.mark.parametrize("value", [None, "5.1", [1]])
def test_a_column_that_is_no_number_is_refused_by_key(tmp_path: Path, value: object) -> None:
    picture = encode(Image.new("RGB", (4, 4)))
    rows = [("a", 1.5), ("b", value)]
    members = []
    for key, number in rows:
        members += [(f"{key}.png", picture), (f"{key}.json", json.dumps({"x": number}).encode())]
    write_tar(tmp_path / "0.tar", members)
    dataset = ShardDataset(tmp_path, resolution=4, columns=["x"])
    assert dataset[0, 0, 0]["x"] == 1.5
    with pytest.raises(CorruptSampleError, match=r"columns: got x=.* in .*0\.tar: b, expected a number"):
        dataset[1, 1, 0]


def test_a_corrupt_image_is_named_by_shard_and_key(tmp_path: Path) -> None:
    whole = encode(Image.effect_noise((32, 32), 50), "JPEG")
    write_tar(tmp_path / "3.tar", [("k0.jpg", whole), ("k1.jpg", whole[: len(whole) // 2])])
    dataset = ShardDataset(tmp_path, resolution=32)
    assert dataset[0, 0, 0]["image"].shape == (3, 32, 32)
    with pytest.raises(CorruptSampleError, match=r"3\.tar: k1\.jpg cannot be decoded"):
        dataset[1, 1, 0]


def test_a_shard_that_differs_from_its_manifest_is_refused(write_noise: WriteNoise) -> None:
    folder = write_noise(10)
    shutil.copy(folder / "00001.tar", folder / "00000.tar")
    with pytest.raises(ValueError, match=r"00000\.tar: got 3 samples, expected 7 as its manifest says"):
        ShardDataset(folder, resolution=8)


def test_latents_of_two_encoders_are_refused(tmp_path: Path) -> None:
    folders = [str(write_latents(tmp_path / name, encoder=name)) for name in ("abc", "xyz")]
    with pytest.raises(ValueError, match=r"encoder_sha256: got abc in .*, xyz in .*, expected one encoder"):
        ShardDataset(folders)


def test_latents_of_an_unknown_encoder_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.npy", encode_npy(np.zeros((8, 2, 2), np.float32))), ("a.json", b"{}")])
    with pytest.raises(ValueError, match="encoder_sha256: got none in"):
        ShardDataset(tmp_path)


def test_a_foreign_latent_inside_a_shard_is_refused_by_key(tmp_path: Path) -> None:
    moments = encode_npy(np.zeros((8, 2, 2), np.float32))
    members = []
    for key in "ab":
        members += [(f"{key}.npy", moments), (f"{key}.json", json.dumps({"encoder_sha256": key}).encode())]
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(CorruptSampleError, match=r"0\.tar: b: got moments of encoder b, expected a"):
        ShardDataset(tmp_path)[1, 1, 0]


def test_images_and_latents_do_not_mix(tmp_path: Path, write_noise: WriteNoise) -> None:
    with pytest.raises(ValueError, match="got a sample that differs from the rest"):
        ShardDataset([str(write_noise(3)), str(write_latents(tmp_path / "latents"))], resolution=8)


@pytest.mark.parametrize("resolution", [None, 0])
def test_images_need_a_resolution(write_noise: WriteNoise, resolution: int | None) -> None:
    with pytest.raises(ValueError, match=r"data\.resolution: got .* expected pixels"):
        ShardDataset(write_noise(3), resolution=resolution)


def test_options_without_effect_on_latents_are_refused(tmp_path: Path) -> None:
    folder = write_latents(tmp_path)
    with pytest.raises(ValueError, match=r"data\.resolution: got 32 for shards of moments"):
        ShardDataset(folder, resolution=32)
    with pytest.raises(ValueError, match=r"data\.flip: got true for shards of moments"):
        ShardDataset(folder, flip=True)
