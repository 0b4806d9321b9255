"""Maps in the json of a sample are cut as its picture is."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import Record, ShardDataset, write_shards
from ldm.data.augmentation import Augmentation
from ldm.data.batches import assemble
from ldm.data.draws import Draws
from ldm.data.geometry import Geometry
from ldm.data.maps import DepthMap, SemanticMap
from ldm.data.tiny import as_png, write_tiny

DRAWS = Draws(seed=0, epoch=0, index=0, purpose="derive")
PIXELS = np.zeros((4, 4, 3), dtype=np.uint8)


def png(values: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def test_a_map_of_the_pictures_size_is_cut_and_mirrored_with_it() -> None:
    values = np.arange(24, dtype=np.uint8).reshape(4, 6)
    geometry = Geometry((6, 4), (6, 4), (4, 4), 1, 0)
    row = {"classes": png(values)}
    found = SemanticMap()(PIXELS, row=row, geometry=geometry, draws=DRAWS)["classes"]
    np.testing.assert_array_equal(found, values[None, :, 1:5])
    mirrored = SemanticMap()(PIXELS, row=row, geometry=geometry.flipped(), draws=DRAWS)["classes"]
    np.testing.assert_array_equal(mirrored, values[None, :, 1:5][..., ::-1])


def test_a_small_map_is_enlarged_without_mixing_classes() -> None:
    row = {"classes": png(np.array([[1, 9]], dtype=np.uint8))}
    found = SemanticMap()(PIXELS, row=row, geometry=Geometry((8, 8), (4, 4), (4, 4), 0, 0), draws=DRAWS)["classes"]
    np.testing.assert_array_equal(found[0], [[1, 1, 9, 9]] * 4)


def test_depths_of_16_bits_keep_their_digits() -> None:
    values = np.array([[0, 40000], [65535, 7]], dtype=np.uint16)
    found = DepthMap()(PIXELS, row={"depth": png(values)}, geometry=Geometry((2, 2), (2, 2), (2, 2), 0, 0), draws=DRAWS)
    np.testing.assert_array_equal(found["depth"], values[None].astype(np.float32))


@pytest.mark.parametrize("value", [None, 3, "no base64", base64.b64encode(b"no png").decode()])
def test_what_holds_no_map_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match="expected a PNG of one value a pixel, in base64"):
        SemanticMap()(PIXELS, row={"classes": value}, geometry=Geometry((2, 2), (2, 2), (2, 2), 0, 0), draws=DRAWS)


def test_the_map_follows_the_picture_through_a_random_cut(tmp_path: Path) -> None:
    """The picture's red channel is the map itself: both are cut alike whatever is drawn."""
    values = np.arange(48, dtype=np.uint8).repeat(2).reshape(1, 96).repeat(64, 0)
    picture = np.stack([values, values, values], axis=2)
    write_shards(tmp_path / "set", [Record(picture, "", {"classes": as_png(values)})])
    dataset = ShardDataset(
        str(tmp_path / "set"), resolution=64, derive=SemanticMap(), augmentation=Augmentation(crop="random", flip=True)
    )
    items = [dataset.read((0, 0, epoch)) for epoch in range(6)]
    assert len({item["image"].tobytes() for item in items}) > 1
    for item in items:
        np.testing.assert_array_equal(item["classes"][0], item["image"][..., 0])


def test_the_tiny_set_has_what_every_derived_thing_reads(tmp_path: Path) -> None:
    assert write_tiny(tmp_path / "tiny", num_train=4, num_validation=2, size=32) == {"train": 4, "validation": 2}
    dataset = ShardDataset(
        str(tmp_path / "tiny/train"), resolution=32, columns=["class_label", "aesthetic_score"], derive=SemanticMap()
    )
    batch = assemble((dataset.read((n, n, 0)) for n in range(4)), 4)
    assert batch["class_label"].tolist() == [0, 1, 2, 3]
    assert set(torch.unique(batch["classes"]).tolist()) == {0, 1, 2, 3, 4}
    assert batch["caption"][0].split()[0] == "a" and (batch["aesthetic_score"] > 4).all()
