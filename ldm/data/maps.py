"""Maps that lie beside a picture, in its json, and are cut as it is: classes and depths of pixels."""

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.draws import Draws
from ldm.data.geometry import Geometry

# Pillow's names of what a PNG of one value a pixel holds: 8 bits, a palette, 16 bits.
MODES = ("L", "P", "I;16", "I")


class SemanticMap:
    """Makes `classes` (1, H, W) uint8 of a json column: a PNG of one class a pixel, in base64.

    The map may be of any size; of each pixel of the cut the class at its middle is taken.

    Args:
        column: of the json.
    """

    def __init__(self, column: str = "classes") -> None:
        self.columns: Sequence[str] = (column,)
        self.column = column

    def __call__(
        self, pixels: np.ndarray, *, row: Mapping[str, Any], geometry: Geometry, draws: Draws
    ) -> dict[str, np.ndarray]:
        """Return `classes`; raises ValueError for a column that holds no map of at most 256 classes."""
        whole = read_map(row, self.column)
        if whole.max(initial=0) > 255:
            raise ValueError(f"got {self.column} with class {whole.max()}, expected at most 255")
        return {"classes": cut_map(whole, geometry).astype(np.uint8)}


class DepthMap:
    """Makes `depth` (1, H, W) float32 of a json column: a PNG of 8 or 16 bits, brighter where nearer, in base64.

    Args:
        column: of the json.
    """

    def __init__(self, column: str = "depth") -> None:
        self.columns: Sequence[str] = (column,)
        self.column = column

    def __call__(
        self, pixels: np.ndarray, *, row: Mapping[str, Any], geometry: Geometry, draws: Draws
    ) -> dict[str, np.ndarray]:
        """Return `depth`; raises ValueError for a column that holds no such PNG."""
        return {"depth": cut_map(read_map(row, self.column), geometry).astype(np.float32)}


def read_map(row: Mapping[str, Any], column: str) -> np.ndarray:
    """The values (H, W) of a PNG in a json column; raises ValueError for a column that holds none."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(row[column], validate=True))) as picture:
            if picture.mode not in MODES:
                raise ValueError(f"a picture of {picture.mode}")
            return np.array(picture)
    except (KeyError, TypeError, ValueError, OSError, binascii.Error) as error:
        raise ValueError(
            f"got {column}={str(row.get(column))[:40]} ({error}), expected a PNG of one value a pixel, in base64"
        ) from error


def cut_map(whole: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The values (1, H, W) at the middles of the pixels of a cut, of a map (h, w) of the whole original picture."""
    width, height = geometry.target
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    if geometry.is_flipped:
        x = width - x
    a, b, c, d, e, f = geometry.inverse()
    across, down = (a * x + b * y + c) / geometry.scaled[0], (d * x + e * y + f) / geometry.scaled[1]
    rows = np.clip((down * whole.shape[0]).astype(int), 0, whole.shape[0] - 1)
    columns = np.clip((across * whole.shape[1]).astype(int), 0, whole.shape[1] - 1)
    return np.asarray(whole[rows, columns][None])
