from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import rgb2lab

from ldm.data import Record, ShardDataModule, ShardDataset, write_shards
from ldm.data.augmentation import Augmentation, SampleDraws
from ldm.data.colour import AB_SCALE, rgb_to_lab
from ldm.data.draws import Draws


def gradient(width: int, height: int) -> np.ndarray:
    """Red says the column and green the row."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, np.full_like(x, 99)], axis=-1).astype(np.uint8)


def draws(index: int = 0, epoch: int = 0) -> SampleDraws:
    return SampleDraws(seed=3, epoch=epoch, index=index)


def test_random_cuts_reach_every_place_and_say_where_they_are() -> None:
    scaled, lefts = gradient(12, 8), set()
    for index in range(100):
        pixels, geometry = Augmentation(crop="random").cut(scaled, (8, 8), draws(index))
        assert pixels[0, 0].tolist() == [geometry.left, geometry.top, 99]
        lefts.add(geometry.left)
    assert lefts == set(range(5))


@pytest.mark.parametrize("measure", ["saliency", "entropy"])
@pytest.mark.parametrize("spot", [10, 100])
def test_smart_cuts_keep_what_is_to_be_seen(measure: str, spot: int) -> None:
    pixels = np.full((64, 160, 3), 128, np.uint8)
    pixels[20:50, spot : spot + 30] = np.random.default_rng(0).integers(0, 256, (30, 30, 3))
    _, geometry = Augmentation(crop=measure).cut(pixels, (64, 64), draws())
    assert geometry.left <= spot
    assert geometry.left + 64 >= spot + 30


@pytest.mark.parametrize("measure", ["saliency", "entropy"])
def test_smart_cuts_of_nothing_are_the_centre(measure: str) -> None:
    _, geometry = Augmentation(crop=measure).cut(np.full((64, 160, 3), 128, np.uint8), (64, 64), draws())
    assert geometry.left == 48


def test_turned_pictures_have_no_empty_corner_and_their_geometry_finds_every_pixel() -> None:
    scaled = gradient(200, 120)
    for index in range(20):
        pixels, geometry = Augmentation(rotation=40, crop="random").cut(scaled, (100, 100), draws(index))
        assert (pixels[..., 2] == 99).all()
        assert abs(geometry.angle) <= 40
        x, y = 30, 70
        column, row = pixels[y, x, :2].astype(float)
        place = geometry.place(np.array([[(column + 0.5) / 200, (row + 0.5) / 120]]))[0] * 100
        np.testing.assert_allclose(place, [x + 0.5, y + 0.5], atol=2)


def test_colours_stay_within_their_strength_and_are_off_by_default() -> None:
    pixels = np.full((4, 4, 3), (100, 150, 200), np.uint8)
    assert Augmentation().coloured(pixels, draws()) is pixels
    means = [Augmentation(brightness=0.2).coloured(pixels, draws(i)).mean() / 150 for i in range(50)]
    assert 0.79 < min(means) < 0.9 and 1.1 < max(means) < 1.21
    for name in ("contrast", "saturation", "hue"):
        assert (Augmentation(**{name: 0.3}).coloured(gradient(9, 9) * 20, draws(1)) != gradient(9, 9) * 20).any()
    grey = np.full((4, 4, 3), 90, np.uint8)
    np.testing.assert_array_equal(Augmentation(hue=0.5, saturation=1.0).coloured(grey, draws(1)), grey)


def test_lab_is_that_of_scikit_image() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(rgb2lab(images.permute(0, 2, 3, 1).double().numpy())).permute(0, 3, 1, 2)
    got = rgb_to_lab(images.double() * 2 - 1) * torch.tensor([50, AB_SCALE, AB_SCALE]).view(3, 1, 1)
    got[:, 0] += 50
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0)
    corners = torch.tensor([[r, g, b] for r in (-1, 1) for g in (-1, 1) for b in (-1, 1)]).float()
    assert rgb_to_lab(corners.view(8, 3, 1, 1)).abs().max() <= 1


def test_lab_reaches_training_and_validation_alike(tmp_path: Path) -> None:
    write_shards(tmp_path, [Record(Image.new("RGB", (4, 4), "red"), "a")])
    data = ShardDataModule(tmp_path, batch_size=1, resolution=4, augmentation=Augmentation(colour_space="lab"))
    batch = next(data.iterate_once("train", 1))
    torch.testing.assert_close(
        batch["image"][0, :, 0, 0], torch.tensor([53.24 / 50 - 1, 80.09 / 110, 67.2 / 110]), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("cache", [False, True])
def test_what_is_drawn_is_of_seed_epoch_and_sample_whatever_the_order(tmp_path: Path, cache: bool) -> None:
    write_shards(
        tmp_path, [Record(np.random.default_rng(i).integers(0, 256, (16, 24, 3), dtype=np.uint8), "") for i in range(4)]
    )
    augmentation = Augmentation(crop="random", flip=True, rotation=20, brightness=0.3, hue=0.1)

    def images(epoch: int, order: range, seed: int = 0) -> dict[int, torch.Tensor]:
        dataset = ShardDataset(tmp_path, resolution=8, augmentation=augmentation, cache=cache, seed=seed)
        return {i: dataset[i, i, epoch]["image"] for i in order}

    first, again = images(0, range(4)), images(0, range(3, -1, -1))
    assert all(torch.equal(first[i], again[i]) for i in range(4))
    for other in (images(1, range(4)), images(0, range(4), seed=1)):
        assert not any(torch.equal(first[i], other[i]) for i in range(4))
    plain = ShardDataset(tmp_path, resolution=8, augmentation=augmentation, cache=cache).unaugmented()
    centre = ShardDataset(tmp_path, resolution=8)
    assert all(torch.equal(plain[i, i, 5]["image"], centre[i, i, 0]["image"]) for i in range(4))


@pytest.mark.parametrize(
    "options", [{"crop": "middle"}, {"rotation": 200}, {"hue": 0.6}, {"brightness": -1}, {"colour_space": "hsv"}]
)
def test_settings_out_of_range_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^augmentation\.{next(iter(options))}: got"):
        Augmentation(**options)


def test_draws_are_even_normal_and_their_own() -> None:
    stream = Draws(seed=0, epoch=0, index=0, purpose="derive")
    uniforms, normals = stream.uniforms(20000), stream.normals([20001])
    assert abs(uniforms.mean() - 0.5) < 0.01 and uniforms.min() >= 0 and uniforms.max() < 1
    assert abs(normals.mean()) < 0.03 and abs(normals.std() - 1) < 0.02
    places = [
        Draws(seed=s, epoch=e, index=i, purpose=p).uniform()
        for s in (0, 1)
        for e in (0, 1)
        for i in (0, 1)
        for p in ("crop", "derive")
    ]
    assert len(set(places)) == 16
    integers = [stream.integer(2, 4) for _ in range(300)]
    assert {integers.count(n) > 60 for n in (2, 3, 4)} == {True}
    assert [Draws(seed=1, epoch=2, index=3, purpose="crop").integer(0, 999), stream.choice([0, 1, 0])] == [880, 1]
