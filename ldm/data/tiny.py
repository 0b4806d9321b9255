"""A generated data set that has all that any experiment reads: for trying them out in seconds, not for learning."""

import base64
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.writer import Record, write_shards

COLOURS = {"red": (220, 40, 40), "green": (30, 140, 60), "blue": (50, 70, 210), "yellow": (230, 210, 60)}
# All words of its captions.
WORDS = ("a", "square", "on", *COLOURS)
NUM_CLASSES = 10


def write_tiny(
    folder: str | os.PathLike[str],
    *,
    num_train: int = 32,
    num_validation: int = 16,
    size: int = 64,
    samples_per_shard: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Write folder/train and folder/validation; return the number of samples in each.

    A sample is a square on a background, captioned; its json has class_label (0 to 9), aesthetic_score, the square's
    box in `boxes`, a map of two classes in `classes` and one of depths in `depth`, as PNGs in base64, and 4 numbers in
    `image_embedding`.
    Raises ValueError for fewer than one sample, and for what `write_shards` refuses.
    """
    if min(num_train, num_validation) < 1 or size < 8:
        raise ValueError(f"dataset: got {num_train} and {num_validation} samples of {size} pixels, expected 1, 1 and 8")
    counts = {"train": (0, num_train), "validation": (num_train, num_validation)}
    for split, (first, count) in counts.items():
        write_shards(
            Path(folder) / split, records(first, count, size=size, seed=seed), samples_per_shard=samples_per_shard
        )
    return {split: count for split, (_, count) in counts.items()}


def records(first: int, count: int, *, size: int, seed: int) -> Iterator[Record]:
    """Yield samples number first, first + 1, ...; each a function of the seed and its number."""
    for number in range(first, first + count):
        yield record(np.random.default_rng([seed, number]), number, size)


def record(random: np.random.Generator, number: int, size: int) -> Record:
    """Return one sample."""
    names = list(COLOURS)
    front, back = (names[i] for i in random.permutation(len(names))[:2])
    side = int(random.integers(size // 4, size // 2))
    left, top = (int(random.integers(0, size - side)) for _ in range(2))
    inside = np.zeros((size, size), dtype=bool)
    inside[top : top + side, left : left + side] = True
    pixels = np.where(inside[..., None], COLOURS[front], COLOURS[back]) + random.normal(0, 6, (size, size, 3))
    label = number % NUM_CLASSES
    box = [label, left / size, top / size, (left + side) / size, (top + side) / size]
    depths = np.linspace(20, 120, size, dtype=np.float32)[:, None] + 100 * inside
    columns = {
        "class_label": label,
        "aesthetic_score": round(float(random.uniform(4, 7)), 2),
        "boxes": [box],
        "classes": as_png(np.where(inside, label + 1, 0)),
        "depth": as_png(depths),
        "image_embedding": [*box[1:3], side / size, label / NUM_CLASSES],
    }
    return Record(pixels.clip(0, 255).astype(np.uint8), f"a {front} square on {back}", columns)


def as_png(values: np.ndarray) -> str:
    """Values (H, W) from 0 to 255 as a PNG in base64."""
    stream = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
