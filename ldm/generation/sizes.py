"""Sizes of pictures, as settings give them."""

from __future__ import annotations

from collections.abc import Sequence


def two_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from one number or two.

    Raises:
        ValueError: neither.
    """
    sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, Sequence) else []
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"got image_size={size}, expected one number of pixels, or two: [height, width]")
    return sides[0], sides[1]


def as_typed(size: tuple[int, int]) -> str:
    """(height, width) as a setting on a command line: one number where the sides are equal."""
    height, width = size
    return str(height) if height == width else f"[{height},{width}]"
