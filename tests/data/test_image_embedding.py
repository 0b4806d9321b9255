"""Embeddings of pictures out of the json."""

from typing import Any

import numpy as np
import pytest

from ldm.data.draws import Draws
from ldm.data.geometry import Geometry
from ldm.data.image_embedding import ImageEmbedding

DRAWS = Draws(seed=0, epoch=0, index=0, purpose="derive")
WHOLE = Geometry((2, 2), (2, 2), (2, 2), 0, 0)
PIXELS = np.zeros((2, 2, 3), dtype=np.uint8)


def read(row: dict[str, Any]) -> np.ndarray:
    return ImageEmbedding()(PIXELS, row=row, geometry=WHOLE, draws=DRAWS)["image_embedding"]


def test_numbers_are_read_as_they_are() -> None:
    found = read({"image_embedding": [1, -0.5, 2.25]})
    assert found.dtype == np.float32
    assert found.tolist() == [1, -0.5, 2.25]


@pytest.mark.parametrize("value", [None, [], "1,2", [1, "2"], [True], [[1.0]], [float("nan")], [1e39]])
def test_anything_else_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"got image_embedding=.*expected a list of numbers"):
        read({"image_embedding": value})
