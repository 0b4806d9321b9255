"""Batches of numbered images, read by any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from ldm.data.worker_signals import WorkerLoader

if TYPE_CHECKING:
    from ldm.generation.evaluation.images import Images

Items = list[dict[str, Any]]


def batches(
    images: Images, indices: Sequence[int], *, batch_size: int, num_workers: int = 0
) -> Iterator[dict[str, Any]]:
    """Batches of the images at these places: "image" uint8 (B, 3, H, W), "index" (B,), "prompt" (B texts), labels (B,).

    Images of another size begin a new batch.

    Raises:
        ValueError: an image cannot be read; names it, and what to set.
    """
    loader: WorkerLoader[Items | ValueError] = WorkerLoader(
        _Numbered(images),
        batch_sampler=[list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)],
        collate_fn=_by_size,
        num_workers=num_workers,
    )
    for group in loader:
        if isinstance(group, ValueError):
            raise ValueError(f"{group}; or set bad_images=skip, which leaves such images out and lists them") from group
        yield from group


class _Numbered(Dataset[Any]):
    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, index: int) -> dict[str, Any] | ValueError:
        try:
            return {**self.images[index], "index": index}
        except ValueError as error:  # raised by the process that asked: a worker's traceback says less than its message
            return error


def _by_size(items: Sequence[dict[str, Any] | ValueError]) -> Items | ValueError:
    runs: list[Items] = []
    for item in items:
        if isinstance(item, ValueError):
            return item
        if not runs or runs[-1][-1]["image"].shape != item["image"].shape:
            runs.append([])
        runs[-1].append(item)
    return [stacked(run) for run in runs]


def stacked(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Items as one batch: tensors and numbers on a new first axis, texts as a list; labels that all of them have."""
    names = [name for name in items[0] if all(name in item for item in items)]
    batch: dict[str, Any] = {}
    for name in names:
        values = [item[name] for item in items]
        tensors = [torch.as_tensor(value) for value in values] if not is_text(values) else None
        batch[name] = torch.stack(tensors) if tensors else values
    return batch


def row_of(images: Images, index: int) -> Mapping[str, Any]:
    """What belongs to an image besides its pixels, which are not decoded where the set can do without."""
    row = getattr(images, "row", None)
    return row(index) if row else {name: value for name, value in images[index].items() if name != "image"}


def is_text(value: Any) -> bool:
    """Whether a value, or the first of a list, is a text."""
    first = value[0] if isinstance(value, list | tuple) and value else value
    return isinstance(first, str)
