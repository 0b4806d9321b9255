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


def check_multiples(size: tuple[int, int], unit: int, *, what: str) -> None:
    """Raises ValueError for (height, width) that a model does not divide, with the nearest that it does.

    Args:
        what: has this size, and gets it from `image_size`.
    """
    if any(side < 1 or side % unit for side in size):
        nearest = (max(unit, round(size[0] / unit) * unit), max(unit, round(size[1] / unit) * unit))
        raise ValueError(
            f"got {what} of {size[1]}x{size[0]} pixels, expected multiples of {unit}, which the autoencoder and "
            f"the network divide by; set image_size={as_typed(nearest)}"
        )


def as_typed(size: tuple[int, int]) -> str:
    """(height, width) as a setting on a command line: one number where the sides are equal."""
    height, width = size
    return str(height) if height == width else f"[{height},{width}]"
