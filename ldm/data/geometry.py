"""Where a batch's picture lies in the picture that it was cut from."""

from dataclasses import dataclass, replace
from math import cos, radians, sin

import numpy as np


@dataclass(frozen=True)
class Geometry:
    """How a picture became one of a batch: scaled, turned about the middle of the cut, cut, and mirrored.

    All sizes are (width, height) in pixels. `left` and `top` say where the cut lies in the scaled picture, `angle` is
    in degrees counter-clockwise, and `zoom` is by how much a turned picture is magnified to have no empty corner.
    """

    original: tuple[int, int]
    scaled: tuple[int, int]
    target: tuple[int, int]
    left: int
    top: int
    angle: float = 0.0
    zoom: float = 1.0
    is_flipped: bool = False

    def flipped(self) -> "Geometry":
        """Return the geometry of the picture mirrored."""
        return replace(self, is_flipped=not self.is_flipped)

    @property
    def crop(self) -> tuple[int, int]:
        """(top, left) of the cut in the scaled picture, which is mirrored first: SDXL's crop condition."""
        rest = self.scaled[0] - self.target[0] - self.left
        return self.top, rest if self.is_flipped else self.left

    def inverse(self) -> tuple[float, float, float, float, float, float]:
        """Return (a, b, c, d, e, f) that take a place (x, y) of the cut to (ax + by + c, dx + ey + f), as scaled."""
        turn, scale = radians(self.angle), 1.0 / self.zoom
        a, b = scale * cos(turn), -scale * sin(turn)
        (width, height), left, top = self.target, self.left, self.top
        middle = left + width / 2, top + height / 2
        return (
            a,
            b,
            middle[0] - a * width / 2 - b * height / 2,
            -b,
            a,
            middle[1] + b * width / 2 - a * height / 2,
        )

    def place(self, points: np.ndarray) -> np.ndarray:
        """Take places (N, 2) in shares of the original picture to shares of the cut, beyond 0 and 1 where cut off."""
        a, b, c, d, e, f = self.inverse()
        scaled = points * np.array(self.scaled, dtype=np.float64) - (c, f)
        inside = scaled @ np.linalg.inv([[a, b], [d, e]]).T / np.array(self.target, dtype=np.float64)
        if self.is_flipped:
            inside[:, 0] = 1.0 - inside[:, 0]
        return np.asarray(inside)
