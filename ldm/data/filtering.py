"""`ldm data filter`: judge every sample, and write which are kept or the kept ones themselves."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.data.copies import CopyWriter
from ldm.data.filters import Filter
from ldm.data.kept import KeptWriter, judge_shards
from ldm.data.shards import resolve_shards

WRITERS: dict[str, type[KeptWriter] | type[CopyWriter]] = {"keys": KeptWriter, "shards": CopyWriter}


def filter_shards(
    shards: str | os.PathLike[str] | Sequence[str],
    chosen: Filter,
    out: str | os.PathLike[str],
    *,
    write: str = "keys",
    metadata: str = "json",
    workers: int = 0,
) -> dict[str, Any]:
    """Write into `out` which samples a filter keeps ("keys", for data.filter) or new shards of them ("shards").

    Returns the filter and its counts. The result depends on the shards and the filter alone, whatever `workers`.
    Raises ValueError or FileNotFoundError for wrong settings, shards or folders, a column that is missing, a value of
    the wrong type and, with no choice of nulls, an undecided sample.
    """
    if write not in WRITERS:
        raise ValueError(f"write: got {write}, expected one of {', '.join(WRITERS)}")
    paths = resolve_shards(shards)
    if Path(out).resolve() in {path.resolve().parent for path in paths}:
        raise ValueError(f"out: got {out}, where the shards are, expected another folder")
    _refuse_first_mistake(paths, chosen, metadata=metadata)
    writer = WRITERS[write](out, chosen)
    for kept in judge_shards(paths, chosen=chosen, metadata=metadata, workers=workers):
        writer.add(kept)
    return writer.finish()


def _refuse_first_mistake(paths: Sequence[Path], chosen: Filter, *, metadata: str) -> None:
    """Judge the first shard before anything is written, so that a misspelt column leaves no folder behind."""
    next(iter(judge_shards(paths[:1], chosen=chosen, metadata=metadata)))
