"""Random numbers of one sample: functions of (seed, epoch, sample, purpose), the same in any process and order."""

from collections.abc import Sequence

import numpy as np

# What draws are for; the numbers are part of every augmented batch and never change.
PURPOSES = {"crop": 1, "rotation": 2, "colour": 3, "caption": 4, "derive": 5}


class Draws:
    """A stream of random numbers that depends on (seed, epoch, index, purpose) alone.

    It is made of the raw words of Philox (Salmon et al. 2011), whose sequence numpy keeps the same between releases.
    """

    def __init__(self, *, seed: int, epoch: int, index: int, purpose: str) -> None:
        # The last word of the counter is above those of `ldm.data.position`, so that the two never share a stream.
        counter = [0, index, epoch, 2**32 + PURPOSES[purpose]]
        self._bits = np.random.Philox(key=[seed, 0], counter=counter)

    def uniforms(self, count: int) -> np.ndarray:
        """Return float64 (count,) in [0, 1)."""
        words: np.ndarray = self._bits.random_raw(count)
        return np.asarray((words >> np.uint64(11)) * 2.0**-53)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return a number in [low, high)."""
        return low + (high - low) * float(self.uniforms(1)[0])

    def integer(self, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`, both included."""
        return min(high, low + int(self.uniform() * (high - low + 1)))

    def choice(self, weights: Sequence[float]) -> int:
        """Return a place in `weights`, as likely as its weight's share of the sum."""
        ends = np.cumsum(weights)
        return min(int(np.searchsorted(ends, self.uniform() * ends[-1], side="right")), len(ends) - 1)

    def normals(self, shape: Sequence[int]) -> np.ndarray:
        """Return standard normal numbers, float32 of this shape (Box and Muller 1958)."""
        count = int(np.prod(shape))
        half = -(-count // 2)
        radius = np.sqrt(-2.0 * np.log1p(-self.uniforms(half)))
        angle = 2.0 * np.pi * self.uniforms(half)
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return both[:count].reshape(shape).astype(np.float32)
