"""A picture's embedding by some other model, as it lies in the json."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.data.draws import Draws
from ldm.data.geometry import Geometry


class ImageEmbedding:
    """Makes `image_embedding` (D,) float32 of a json column: a list of D numbers, the same however the picture is cut.

    Args:
        column: of the json.
    """

    def __init__(self, column: str = "image_embedding") -> None:
        self.columns: Sequence[str] = (column,)
        self.column = column

    def __call__(
        self, pixels: np.ndarray, *, row: Mapping[str, Any], geometry: Geometry, draws: Draws
    ) -> dict[str, np.ndarray]:
        """Return `image_embedding`; raises ValueError for a column that is no list of finite numbers."""
        found = row.get(self.column)
        if isinstance(found, list) and found and all(type(number) in (int, float) for number in found):
            embedding = np.array(found, dtype=np.float64)
            if np.abs(embedding).max() <= np.finfo(np.float32).max:
                return {"image_embedding": embedding.astype(np.float32)}
        raise ValueError(f"got {self.column}={str(found)[:60]}, expected a list of numbers")
