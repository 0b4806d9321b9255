"""Samples of many prompts as WebDataset shards, each a task of its own that is done whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ldm.files import replacing, write_text
from ldm.generation.evaluation.workers import Task

Draw = Callable[[Sequence[str], Sequence[int]], list[Image]]
"""From prompts and as many seeds to pictures, each of which depends on its own prompt and seed alone."""


@dataclass(frozen=True)
class Item:
    """One sample to make: its number, prompt, seed and labels."""

    index: int
    prompt: str
    seed: int
    labels: Mapping[str, float] = field(default_factory=dict)


def items_of(prompts: Sequence[Mapping[str, Any]], *, num_samples: int | None, seed: int) -> list[Item]:
    """One item a prompt, or `num_samples` spread evenly over the prompts; item i has seed `seed + i`.

    Args:
        prompts: each with "prompt", and labels.
    """
    count = len(prompts) if num_samples is None else num_samples
    chosen = [prompts[i * len(prompts) // count] for i in range(count)]
    return [
        Item(i, str(prompt["prompt"]), seed + i, {name: value for name, value in prompt.items() if name != "prompt"})
        for i, prompt in enumerate(chosen)
    ]


def sha256_of_items(items: Sequence[Item]) -> str:
    """A hash of all that an item says."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(_row(item), sort_keys=True).encode())
    return digest.hexdigest()


def sampling_tasks(items: Sequence[Item], folder: Path, draw: Draw, *, shard_size: int, batch_size: int) -> list[Task]:
    """A task a shard: folder/00000.tar, and after it folder/00000.done."""

    def task(number: int) -> Task:
        part = items[number * shard_size : (number + 1) * shard_size]
        path = shard_path(folder, number)
        return Task(
            f"{path.name}.lock",
            lambda: is_written(path, len(part)),
            lambda: write_shard(path, part, draw, batch_size=batch_size),
        )

    return [task(number) for number in range(-(-len(items) // shard_size))]


def write_shard(path: Path, items: Sequence[Item], draw: Draw, *, batch_size: int) -> None:
    """Samples the items, a batch at a time, into a tar, and marks it as done."""
    start = time.monotonic()
    with replacing(path) as temporary:
        _write_tar(temporary, items, draw, batch_size)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    facts = {"sha256": sha256, "num_samples": len(items), "seconds": time.monotonic() - start}
    write_text(path.with_suffix(".done"), json.dumps(facts) + "\n")


def is_written(path: Path, num_samples: int) -> bool:
    """Whether a shard is whole."""
    mark = path.with_suffix(".done")
    return mark.is_file() and path.is_file() and json.loads(mark.read_text())["num_samples"] == num_samples


def shard_path(folder: Path, number: int) -> Path:
    """Where shard `number` is."""
    return folder / f"{number:05d}.tar"


def seconds_of(folder: Path) -> float:
    """How long all shards took, whichever processes made them, in seconds of one process."""
    return float(sum(json.loads(mark.read_text())["seconds"] for mark in sorted(folder.glob("*.done"))))


def _write_tar(path: Path, items: Sequence[Item], draw: Draw, batch_size: int) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for start in range(0, len(items), batch_size):
            part = items[start : start + batch_size]
            pictures = draw([item.prompt for item in part], [item.seed for item in part])
            for item, picture in zip(part, pictures, strict=True):
                stream = io.BytesIO()
                picture.save(stream, format="PNG")
                _add(tar, f"{item.index:08d}.png", stream.getvalue())
                _add(tar, f"{item.index:08d}.json", json.dumps(_row(item)).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # Without a time, so that the bytes depend on the samples alone.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _row(item: Item) -> dict[str, Any]:
    return {"index": item.index, "seed": item.seed, "prompt": item.prompt, "labels": dict(item.labels)}
