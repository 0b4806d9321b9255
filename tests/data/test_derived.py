"""What is made of pictures besides themselves: masks, small pictures, boxes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_picture_content import photograph

from ldm.data import CorruptSampleError, Record, ShardDataset, write_shards
from ldm.data.augmentation import Augmentation
from ldm.data.batches import assemble, to_numbers
from ldm.data.degradation import LowResolution
from ldm.data.draws import Draws
from ldm.data.geometry import Geometry
from ldm.data.layout import Boxes
from ldm.data.masks import RandomMask

PLAIN = Geometry((64, 48), (64, 48), (64, 48), 0, 0)


def derived(derive: Any, index: int = 0, pixels: np.ndarray | None = None, row: Any = None) -> dict[str, np.ndarray]:
    pixels = np.asarray(photograph(64, 48)) if pixels is None else pixels
    draws = Draws(seed=0, epoch=0, index=index, purpose="derive")
    return derive(pixels, row=row or {}, geometry=PLAIN, draws=draws)


@pytest.mark.parametrize("kind", ["strokes", "boxes", "lama"])
def test_masks_cover_some_of_the_picture_and_differ(kind: str) -> None:
    masks = [derived(RandomMask(kind), i)["mask"] for i in range(60)]
    shares = np.array([mask.mean() for mask in masks])
    assert all(mask.shape == (1, 48, 64) and set(np.unique(mask)) <= {0, 1} for mask in masks)
    assert 0 < shares.min() < 0.25 < shares.max() <= 0.9
    assert len({mask.tobytes() for mask in masks}) == 60
    np.testing.assert_array_equal(masks[7], derived(RandomMask(kind), 7)["mask"])


def test_a_mask_never_covers_more_than_it_may() -> None:
    assert max(derived(RandomMask(max_share=0.05), i)["mask"].mean() for i in range(30)) <= 0.06
    assert {derived(RandomMask(whole=1.0), i)["mask"].min() for i in range(3)} == {1}


def test_boxes_of_masks_keep_their_margin() -> None:
    mask = np.max([derived(RandomMask("boxes", margin=60), i)["mask"] for i in range(30)], axis=0)[0]
    assert not mask[:11].any() and not mask[:, :11].any() and mask.any()


def test_small_pictures_are_pillows_bicubic_ones_or_degraded() -> None:
    image = photograph(64, 48)
    small = derived(LowResolution(4))["low_res"]
    np.testing.assert_array_equal(small, np.asarray(image.resize((16, 12), Image.Resampling.BICUBIC)))
    degraded = [derived(LowResolution(4, kind="bsr"), i)["low_res"].astype(int) for i in range(12)]
    errors = [np.abs(picture - small).mean() for picture in degraded]
    assert all(picture.shape == (12, 16, 3) for picture in degraded)
    assert 1 < min(errors) < max(errors) < 40
    np.testing.assert_array_equal(degraded[3], derived(LowResolution(4, kind="bsr"), 3)["low_res"])


@pytest.mark.parametrize(
    "make",
    [lambda: RandomMask("dots"), lambda: LowResolution(3), lambda: LowResolution(kind="x"), lambda: Boxes(max_boxes=0)],
)
def test_settings_that_cannot_be_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"^derive.*: got"):
        make()


def test_batches_hold_what_is_derived_as_numbers(tmp_path: Path) -> None:
    write_shards(tmp_path, [Record(photograph(16, 16), "a") for _ in range(3)])
    for derive, name, shape in ((RandomMask(), "mask", (3, 1, 16, 16)), (LowResolution(4), "low_res", (3, 3, 4, 4))):
        dataset = ShardDataset(tmp_path, resolution=16, derive=derive)
        batch = to_numbers(assemble((dataset.read((i, i, 0)) for i in range(3)), 3))
        assert (batch[name].dtype, tuple(batch[name].shape)) == (torch.float32, shape)
        assert torch.equal(batch[name][1], dataset[1, 1, 0][name])
        assert not torch.equal(batch[name][0], dataset[0, 0, 1][name]) or name == "low_res"


def test_boxes_follow_the_picture_through_cut_turn_and_mirror(tmp_path: Path) -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[10:20, 30:50] = 255  # the box
    row = {"boxes": [[5, 30 / 80, 10 / 40, 50 / 80, 20 / 40], [6, 0.0, 0.0, 0.05, 1.0]]}
    write_shards(tmp_path, [Record(pixels, "a", row)])
    augmentation = Augmentation(crop="random", flip=True, rotation=8)
    dataset = ShardDataset(tmp_path, resolution=40, augmentation=augmentation, derive=Boxes(max_boxes=3))
    seen = set()
    for epoch in range(30):
        item = dataset[0, 0, epoch]
        boxes = item["boxes"][item["boxes"][:, 0] == 5]
        white = np.argwhere(item["image"][0].numpy() > 0)
        if len(boxes) and len(white):
            top, left = white.min(axis=0)
            bottom, right = white.max(axis=0) + 1
            np.testing.assert_allclose(boxes[0, 1:] * 40, [left, top, right, bottom], atol=2)
            seen.add(round(float(boxes[0, 1]), 2))
        assert (item["boxes"][:, 0] >= -1).all() and item["boxes"].shape == (3, 5)
    assert len(seen) > 8
    plain = ShardDataset(tmp_path, resolution=40, derive=Boxes(max_boxes=3))[0, 0, 0]["boxes"]
    torch.testing.assert_close(plain, torch.tensor([[5, 0.25, 0.25, 0.75, 0.5], [-1, 0, 0, 0, 0], [-1, 0, 0, 0, 0]]))


@pytest.mark.parametrize("boxes", [None, "x", [[1, 2]], [[1, 0.5, 0.1, 0.2, 0.3]], [[-1, 0, 0, 1, 1]]])
def test_a_sample_whose_boxes_are_none_is_bad_by_name(tmp_path: Path, boxes: Any) -> None:
    write_shards(tmp_path, [Record(photograph(8, 8), "a", {"boxes": boxes})])
    with pytest.raises(CorruptSampleError, match="000000000: got a json of which nothing can be derived"):
        ShardDataset(tmp_path, resolution=8, derive=Boxes())[0, 0, 0]


def test_a_column_that_no_sample_has_is_refused_before_training(tmp_path: Path) -> None:
    write_shards(tmp_path, [Record(photograph(8, 8), "a", {"bxes": []})])
    with pytest.raises(ValueError, match=r"^data\.derive: got boxes, expected some of bxes, caption, "):
        ShardDataset(tmp_path, resolution=8, derive=Boxes())
