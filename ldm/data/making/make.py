"""Shards out of any source of pictures: prepared in several processes, written in order, gone on with after a kill.

The bytes are a function of the source and the options: the number of processes changes nothing, nor does being killed,
after which the same call goes on after the last shard that was written.
"""

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from ldm.data.making.dropped import Dropped
from ldm.data.making.duplicates import MAX_DISTANCE
from ldm.data.making.journal import Journal, Place, finished_summary
from ldm.data.making.picture import Preparation, Prepared, prepare
from ldm.data.making.pool import stream_in_order
from ldm.data.making.sources import Item, Source, stamp
from ldm.data.writer import check_shard_size

# Items that a process prepares at a time.
CHUNK = 8
# Part of what decides the bytes; another number, and a set that was begun is begun anew.
LAYOUT = 1
FAULTS = ("drop", "refuse")


def make_shards(
    folder: str | os.PathLike[str],
    *,
    source: Source,
    resolution: int | None = None,
    resize_filter: str = "area",
    enlarge: bool = False,
    crop: str = "none",
    reencode: str = "always",
    image_format: str = "jpg",
    quality: int = 95,
    min_size: int = 0,
    captions: str = "required",
    duplicates: str = "keep",
    duplicate_distance: int = 0,
    faults: str = "drop",
    samples_per_shard: int = 1000,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda written, dropped: None,
) -> dict[str, Any]:
    """Write the pictures of a source as shards into folder/train, and what was left out into dropped.jsonl.

    Args:
        source: the pictures; `resolution` to `duplicates` are how they are prepared, see `Preparation`.
        duplicate_distance: bits, of 64, in which the hashes of perceptual duplicates may differ; the first one stays.
        faults: "drop" leaves out what cannot be written, "refuse" stops there.
        samples_per_shard: at most 10,000; every shard but the last has as many.
        workers: processes that prepare pictures; 0 = this one alone.
        progress: called with the number of samples written and of pictures dropped, after each.

    Returns the number of samples, of what was dropped by reason, and an example of each. Raises ValueError for an
    impossible option, where nothing is left, and with faults="refuse" for the first picture that cannot be written.
    """
    preparation = Preparation(
        resolution=resolution,
        resize_filter=resize_filter,
        enlarge=enlarge,
        crop=crop,
        reencode=reencode,
        image_format=image_format,
        quality=quality,
        min_size=min_size,
        captions=captions,
        duplicates=duplicates,
    )
    check_shard_size(samples_per_shard)
    _check(faults, workers, duplicate_distance, preparation)
    sizes = {"samples_per_shard": samples_per_shard, "distance": duplicate_distance}
    target, identity = Path(folder) / "train", _identity(source, {**asdict(preparation), **sizes})
    if (finished := finished_summary(target, identity)) is not None:
        return finished
    with (
        closing(Journal(target, identity, hash_bytes=preparation.hash_bytes, **sizes)) as journal,
        closing(_prepared(source, journal.progress.place, preparation, workers=workers)) as outcomes,
    ):
        for place, outcome in outcomes:
            journal.reach(place)
            _note(journal, outcome, faults=faults)
            progress(journal.num_samples, sum(journal.progress.dropped.values()))
        return journal.finish()


def _note(journal: Journal, outcome: Prepared | Dropped, *, faults: str) -> None:
    """Write what was prepared, or note that it is dropped; raises ValueError where faults are refused."""
    dropped = journal.take(outcome) if isinstance(outcome, Prepared) else outcome
    if dropped is None:
        return
    if faults == "refuse" and dropped.reason != "duplicate":
        raise ValueError(f"{dropped.source}: {dropped.detail}")
    journal.drop(dropped)


def _check(faults: str, workers: int, distance: int, preparation: Preparation) -> None:
    if faults not in FAULTS:
        raise ValueError(f"faults: got {faults!r}, expected one of {', '.join(FAULTS)}")
    if workers < 0:
        raise ValueError(f"workers: got {workers}, expected 0 for this process alone, or more")
    if distance and preparation.duplicates != "perceptual":
        raise ValueError(
            f"duplicate_distance: got {distance} with duplicates={preparation.duplicates}, which knows no distance; "
            "set duplicates=perceptual"
        )
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"duplicate_distance: got {distance}, expected 0 to {MAX_DISTANCE} bits")


def _identity(source: Source, options: dict[str, Any]) -> str:
    """Say in 16 hex digits what decides the bytes: source, files, options, and the libraries that encode."""
    files = [(path, stamp(path)) for path in source.files()]
    facts = [LAYOUT, repr(source), files, options, PIL.__version__, np.__version__]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _chunks(source: Source, start: Place) -> Iterator[list[tuple[Place, Item]]]:
    """Yield the items from a place on, each with the place after it, some at a time."""
    placed = (
        (Place(number, i), item)
        for number, part in enumerate(source.parts())
        if number >= start.part
        for i, item in enumerate(source.items(part), 1)
        if number > start.part or i > start.item
    )
    while chunk := list(islice(placed, CHUNK)):
        yield chunk


def _prepared(
    source: Source, start: Place, preparation: Preparation, *, workers: int
) -> Generator[tuple[Place, Prepared | Dropped]]:
    """Yield what becomes of every item from a place on, in order, and the place after it."""
    work = partial(_prepare_all, preparation=preparation)
    with closing(stream_in_order(work, _chunks(source, start), workers=workers)) as results:
        yield from chain.from_iterable(results)


def _prepare_all(
    chunk: list[tuple[Place, Item]], *, preparation: Preparation
) -> list[tuple[Place, Prepared | Dropped]]:
    return [(place, prepare(item, preparation)) for place, item in chunk]
