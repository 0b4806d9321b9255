"""Images that cannot be read: left out where that is wanted, and named in the protocol."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch.utils.data import Dataset

from ldm.data.worker_signals import WorkerLoader
from ldm.generation.evaluation.batches import row_of
from ldm.generation.evaluation.images import Images

BAD_IMAGES = ("refuse", "skip")


class Without:
    """A set of images less some of them, numbered anew.

    Args:
        images: the whole set.
        left_out: the numbers there of those that it goes without.

    Raises:
        ValueError: none is left.
    """

    def __init__(self, images: Images, left_out: Collection[int]) -> None:
        self.images, self.left_out = images, sorted(left_out)
        missing = set(left_out)
        self.places = [index for index in range(len(images)) if index not in missing]
        if not self.places:
            raise ValueError(f"got {len(images)} images, of which none can be read, expected at least one")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """As in `Images`."""
        return self.images[self.places[index]]

    def row(self, index: int) -> Mapping[str, Any]:
        """Prompt and labels alone."""
        return row_of(self.images, self.places[index])

    def name(self, index: int) -> str:
        """As in `Images`."""
        return self.images.name(self.places[index])

    def describe(self) -> dict[str, Any]:
        """As in `Images`, with the number in the whole set, and the name, of each that is left out."""
        told = [{"index": index, "name": self.images.name(index)} for index in self.left_out]
        return {**self.images.describe(), "count": len(self), "left_out": told}


def readable(images: Images, *, num_workers: int = 0) -> Images:
    """The images that can be read: the very set where all can, else `Without` the others. Every image is tried.

    Raises:
        ValueError: none can.
    """
    loader: WorkerLoader[list[int]] = WorkerLoader(
        _Unreadable(images), batch_size=64, collate_fn=_numbers, num_workers=num_workers
    )
    bad = [number for numbers in loader for number in numbers]
    return Without(images, bad) if bad else images


class _Unreadable(Dataset["int | None"]):
    """The number of an image that cannot be read, None for one that can."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> int | None:
        try:
            self.images[index]
        except ValueError:  # as all sets raise it for a bad image; a disk that fails is another matter
            return index
        return None


def _numbers(items: list[int | None]) -> list[int]:
    return [item for item in items if item is not None]
