"""What of a set of shards can be read: whole samples of shards that were cut off, and no sample without a payload."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm.data.faults import Fault, has_end_marker
from ldm.data.index_file import open_index, read_index
from ldm.data.shards import (
    IMAGE_SUFFIXES,
    BrokenTarError,
    ShardIndex,
    index_members,
    resolve_shards,
    scan_members,
    split_name,
)
from ldm.data.writer import IN_PROGRESS, read_manifest

if TYPE_CHECKING:
    from ldm.data.remote import ShardCache

# How many unusable shards one message names.
MAX_NAMED = 5


def open_readable(
    shards: str | os.PathLike[str] | Sequence[str], *, bad_shards: str = "refuse", remote: "ShardCache | None" = None
) -> tuple[list[ShardIndex], list[Fault]]:
    """Return the indices of all shards that can be read, and what is wrong with the others; see `each_readable`."""
    indices, faults = [], []
    for index, found in each_readable(shards, bad_shards=bad_shards, remote=remote):
        indices += [index] if index is not None else []
        faults += found
    return indices, faults


def each_readable(
    shards: str | os.PathLike[str] | Sequence[str], *, bad_shards: str = "refuse", remote: "ShardCache | None" = None
) -> Iterator[tuple[ShardIndex | None, list[Fault]]]:
    """Yield the index of each shard, and what is wrong with it where it cannot be read, or not to the end.

    A shard that was cut off is read up to its last whole sample. What to do with any other that is no whole tar says
    `bad_shards`: "refuse" raises, at the end, one ValueError that names them, "skip" leaves them out.
    """
    if bad_shards not in ("refuse", "skip"):
        raise ValueError(f"data.bad_shards: got {bad_shards!r}, expected refuse or skip")
    unusable: list[str] = []
    num_usable = 0
    for path in remote.locate(shards) if remote else resolve_shards(shards):
        try:
            yield remote.open_index(path) if remote else open_whole_samples(path)
            num_usable += 1
        except ValueError as error:
            unusable.append(str(error))
            kind = error.kind if isinstance(error, BrokenTarError) else "repeated_member"
            yield None, [Fault(str(path), "", kind, str(error).removeprefix(f"{path}: "))]
    if unusable and (bad_shards == "refuse" or not num_usable):
        raise ValueError(_refusal(unusable, left_out=bad_shards == "skip"))


def open_whole_samples(path: Path) -> tuple[ShardIndex, list[Fault]]:
    """Return a shard's index, of its whole samples where it was cut off, and the fault that tells so.

    Raises ValueError for a file that is no tar, is broken in its middle, holds a member twice, or has no whole sample.
    """
    kept = read_index(path)
    if kept is not None:
        return kept, []
    try:
        index = open_index(path)
        return (index, []) if has_end_marker(path) else _without_its_end(index)
    except BrokenTarError as error:
        if error.kind != "truncated_tar":
            raise
        index = _whole_samples(path)
        if not len(index):
            raise
        reason = f"{str(error).removeprefix(f'{path}: ')}; {len(index)} samples before the cut are read"
        return index, [Fault(str(path), "", "truncated_tar", reason)]


def _without_its_end(index: ShardIndex) -> tuple[ShardIndex, list[Fault]]:
    """Return the index of a tar that has no end, and the fault that tells so.

    A cut between two members leaves no other trace: where the last sample lacks what all others have, it is left out.
    """
    is_part = len(index) > 1 and bool(((index.sizes[-1] < 0) & (index.sizes[:-1] >= 0).all(0)).any())
    reason = "got no end marker, expected 1024 bytes of zeros"
    if not is_part:
        return index, [Fault(str(index.path), "", "no_end_marker", reason)]
    index, cut = index.select(np.arange(len(index) - 1)), index.keys[-1]
    reason = f"{reason}: cut off within {cut}; {len(index)} samples before the cut are read"
    return index, [Fault(str(index.path), "", "truncated_tar", reason)]


def drop_without_payload(shard: ShardIndex) -> tuple[ShardIndex, list[Fault]]:
    """Return a shard without the samples that have neither an image nor moments, and a fault for each of these."""
    has_payload = shard.has_any([*IMAGE_SUFFIXES, "npy"])
    if has_payload.all():
        return shard, []
    faults = []
    for row in np.flatnonzero(~has_payload).tolist():
        reason = f"got {sorted(shard.members(row))}, expected an image or moments"
        faults.append(Fault(str(shard.path), shard.keys[row], "no_image", reason))
    return shard.select(np.flatnonzero(has_payload)), faults


class Manifests:
    """What the manifests beside shards say of them; each is read once."""

    def __init__(self) -> None:
        self._stated: dict[Path, dict[str, int]] = {}

    def check(self, shard: ShardIndex) -> None:
        """Refuse a shard of a set that is still being written, or with other samples than its manifest says.

        Raises ValueError.
        """
        folder = shard.path.parent
        if folder not in self._stated:
            if (folder / IN_PROGRESS).exists():
                raise ValueError(f"{folder}: got an unfinished set of shards, expected a whole one; write it again")
            entries = (read_manifest(folder) or {}).get("shards", [])
            self._stated[folder] = {entry["name"]: entry["num_samples"] for entry in entries}
        stated = self._stated[folder].get(shard.path.name, len(shard))
        if stated != len(shard):
            raise ValueError(
                f"{shard.path}: got {len(shard)} samples, expected {stated} as its manifest says; "
                "write the shards again"
            )


def _whole_samples(path: Path) -> ShardIndex:
    """Return the index of a shard that was cut off, without the sample inside which it ends."""
    members: list[tuple[str, int, int]] = []
    cut = ""
    try:
        for member in scan_members(path):
            members.append(member)
    except BrokenTarError as error:
        # A cut inside a header leaves no name, and it may have been of one more member of the last sample.
        cut = split_name(error.member or members[-1][0])[0] if error.member or members else ""
    return index_members(path, [member for member in members if split_name(member[0])[0] != cut])


def _refusal(unusable: Sequence[str], *, left_out: bool) -> str:
    more = f"; and {len(unusable) - MAX_NAMED} more" if len(unusable) > MAX_NAMED else ""
    named = "; ".join(unusable[:MAX_NAMED])
    if len(unusable) == 1 and not left_out:
        return f"{named}, or set data.bad_shards=skip to leave it out"
    remedy = "expected some that can be read" if left_out else "or set data.bad_shards=skip to leave them out"
    return f"{len(unusable)} shards cannot be read: {named}{more}; {remedy}"
