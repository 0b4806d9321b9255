"""Boxes around what is to be seen, for training to draw a layout: they follow the picture wherever it is cut."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.data.draws import Draws
from ldm.data.geometry import Geometry

# In place of a class, where there is no box.
NOTHING = -1.0


class Boxes:
    """Makes `boxes` (max_boxes, 5) of a json column: class, left, top, right, bottom in shares of the picture.

    Boxes are scaled, cut, turned and mirrored with the picture; of a turned box the upright one around it is taken. One
    of which less than `min_share` is left is dropped; of too many, the largest stay. Rows without a box have class -1.

    Args:
        column: of the json, a list of [class, left, top, right, bottom] in shares of the picture in the shard.
        max_boxes: rows of the result.
        min_share: of a box's area that has to be inside the cut.

    Raises:
        ValueError: a number out of range; when called, a column that is not such a list.
    """

    def __init__(self, column: str = "boxes", *, max_boxes: int = 30, min_share: float = 0.2) -> None:
        if max_boxes < 1 or not 0 <= min_share <= 1:
            raise ValueError(f"derive: got max_boxes={max_boxes} and min_share={min_share}, expected 1 or more, 0 to 1")
        self.columns: Sequence[str] = (column,)
        self.column, self.max_boxes, self.min_share = column, max_boxes, min_share

    def __call__(
        self, pixels: np.ndarray, *, row: Mapping[str, Any], geometry: Geometry, draws: Draws
    ) -> dict[str, np.ndarray]:
        """Return `boxes`, float32 (max_boxes, 5), the largest first."""
        found = self._read(row)
        left, top, right, bottom = found[:, 1:].T
        corners = [np.stack([x, y], axis=1) for x in (left, right) for y in (top, bottom)]
        places = np.stack([geometry.place(corner) for corner in corners])
        whole = np.concatenate([places.min(axis=0), places.max(axis=0)], axis=1)
        inside = whole.clip(0.0, 1.0)
        areas, wholes = _area(inside), _area(whole)
        kept = np.flatnonzero((areas > 0) & (areas >= self.min_share * wholes))
        kept = kept[np.argsort(-areas[kept], kind="stable")][: self.max_boxes]
        boxes = np.zeros((self.max_boxes, 5), dtype=np.float32)
        boxes[:, 0] = NOTHING
        boxes[: len(kept)] = np.concatenate([found[kept, :1], inside[kept]], axis=1)
        return {"boxes": boxes}

    def _read(self, row: Mapping[str, Any]) -> np.ndarray:
        boxes = row.get(self.column)
        if not isinstance(boxes, list) or any(not isinstance(box, list) or len(box) != 5 for box in boxes):
            raise ValueError(
                f"got {self.column}={str(boxes)[:60]}, expected a list of [class, left, top, right, bottom]"
            )
        found = np.array(boxes, dtype=np.float64).reshape(-1, 5)
        wrong = ~((found[:, 0] >= 0) & (found[:, 1] <= found[:, 3]) & (found[:, 2] <= found[:, 4]))
        if wrong.any() or not np.isfinite(found).all():
            raise ValueError(
                f"got {found[int(np.argmax(wrong))].tolist()}, expected class >= 0, left <= right, top <= bottom"
            )
        return found


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.asarray((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
