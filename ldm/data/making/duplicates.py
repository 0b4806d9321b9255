"""Pictures that were written before: hashes of all of them, looked up in constant time."""

import os
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

MAX_DISTANCE = 7


class SeenHashes:
    """The hashes of the pictures written so far, in memory and in a file that a restart reads.

    Hashes are looked up whole, or, with a distance d, by d + 1 bands of their bits: two that differ in at most d bits
    are equal in at least one band (the pigeonhole principle).
    """

    def __init__(self, path: str | os.PathLike[str], *, num_bytes: int, distance: int, count: int) -> None:
        """Read the first `count` hashes of `num_bytes` each from the file, and cut off what follows.

        Raises ValueError for a file that holds fewer, and for a distance that is not 0 to MAX_DISTANCE.
        """
        if not 0 <= distance <= MAX_DISTANCE:
            raise ValueError(f"duplicate_distance: got {distance}, expected 0 to {MAX_DISTANCE} bits")
        self.num_bytes, self.distance = num_bytes, distance
        self._count = 0
        self._bands: list[defaultdict[int, list[tuple[int, int]]]] = [defaultdict(list) for _ in range(distance + 1)]
        self._stream = Path(path).open("a+b")  # noqa: SIM115 (closed by close)
        self._stream.seek(0)
        content = self._stream.read(count * num_bytes)
        if len(content) != count * num_bytes:
            raise ValueError(f"{path}: got {len(content)} bytes, expected {count} hashes of {num_bytes}")
        self._stream.truncate(len(content))
        for start in range(0, len(content), num_bytes or 1):
            self._remember(content[start : start + num_bytes])

    def find(self, digest: bytes) -> int | None:
        """Return the number of the first picture added that has this hash, or nearly; None where there is none."""
        if not self.num_bytes:
            return None
        value = int.from_bytes(digest, "big")
        near = [
            number
            for bands, key in zip(self._bands, self._keys(value), strict=True)
            for other, number in bands.get(key, ())
            if (value ^ other).bit_count() <= self.distance
        ]
        return min(near, default=None)

    def add(self, digest: bytes) -> None:
        """Remember the hash of the next picture."""
        if self.num_bytes:
            self._stream.write(digest)
            self._remember(digest)

    def flush(self) -> None:
        """Put all hashes on disk."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _remember(self, digest: bytes) -> None:
        value = int.from_bytes(digest, "big")
        for bands, key in zip(self._bands, self._keys(value), strict=True):
            bands[key].append((value, self._count))
        self._count += 1

    def _keys(self, value: int) -> list[int]:
        """Cut the bits of a hash into bands as equal as can be."""
        bits, count = 8 * self.num_bytes, self.distance + 1
        edges = [bits * i // count for i in range(count + 1)]
        return [(value >> low) & ((1 << (high - low)) - 1) for low, high in pairwise(edges)]
