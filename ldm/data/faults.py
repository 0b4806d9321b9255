"""The kinds of faults that shards have, and those that the headers of a tar already show."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ldm.data.shards import (
    IMAGE_SUFFIXES,
    MAX_BYTES,
    REGULAR,
    SUFFIXES,
    BrokenTarError,
    ShardIndex,
    index_members,
    scan_entries,
    split_name,
)


class Kind(NamedTuple):
    """What a kind of fault means, and what reading for training does about it.

    `outcome` is "refused" (training does not start, or stops there), "skipped" (another sample stands in for it, and
    bad_samples.jsonl has a line), "ignored" (the member is never touched) or "converted" (the sample is read all the
    same, as `meaning` says).
    """

    outcome: str
    meaning: str


KINDS = {
    "empty_file": Kind("refused", "a file of no bytes"),
    "not_a_tar": Kind("refused", "no tar from its first byte on, such as a web page or a compressed file"),
    "broken_tar": Kind("refused", "a tar with other bytes where a header should be"),
    "truncated_tar": Kind("skipped", "a tar that ends inside a member; the samples before it are read"),
    "no_end_marker": Kind("converted", "a tar without its end, perhaps cut off between two members; read as it is"),
    "no_samples": Kind("ignored", "a tar without a sample"),
    "wrong_count": Kind("refused", "another number of samples than the manifest beside it states"),
    "repeated_member": Kind("refused", "a key with two members of one suffix"),
    "interleaved_key": Kind("converted", "a key whose members do not lie together, which are put together"),
    "unsafe_key": Kind("ignored", "a key that would leave its folder as a path; no key is ever used as one"),
    "unsafe_member": Kind("ignored", "a member that runs code where it is loaded, such as a pickle; never read"),
    "compressed_member": Kind("ignored", "a compressed member; never inflated"),
    "dotted_key": Kind(
        "ignored", "a key with a dot, at which it ends by webdataset's rule; its members are never read"
    ),
    "not_a_file": Kind("ignored", "a link, device or pipe"),
    "no_image": Kind("skipped", "neither an image nor moments"),
    "several_images": Kind("converted", "several images, of which the first of jpg, jpeg, png, webp is read"),
    "oversized_member": Kind("skipped", "a member too large to be read; it is not"),
    "broken_image": Kind("skipped", "an image that cannot be decoded to its end"),
    "image_bomb": Kind("skipped", "an image of more pixels than are ever decoded"),
    "broken_array": Kind("skipped", "moments, text embeddings or a class that cannot be read, or a pickle"),
    "broken_json": Kind("skipped", "json that cannot be read, or is no object"),
    "not_utf8": Kind("skipped", "text or json that is not UTF-8"),
    "missing_caption": Kind("converted", "neither a text nor a caption in the json; read as the empty caption"),
    "cmyk": Kind("converted", "an image in printing colours, converted to RGB without their profile"),
    "sixteen_bit": Kind("converted", "an image with 16 bits a channel, cut to 8"),
    "palette": Kind("converted", "an image with a palette, converted to RGB"),
    "transparency": Kind("converted", "an image with transparency, laid on white"),
    "exif_rotated": Kind("converted", "an image that its EXIF data turn upright"),
    "animated": Kind("converted", "an image of several frames, of which the first is read"),
    "missing_column": Kind("skipped", "a json in which one of data.columns is no number"),
    "foreign_moments": Kind("refused", "moments of another encoder than the first sample's"),
    "unreadable": Kind("skipped", "bytes that the disk does not give, as of a shard that was cut off meanwhile"),
    "tiny_image": Kind("converted", "an image with a side below min_side, scaled up"),
}
# What no single sample shows: found by reading for training, and moments of two encoders in a shard by looking too.
OF_READING = ("missing_column", "foreign_moments", "unreadable")
# Suffixes that some loader unpickles, imports or runs.
UNSAFE_SUFFIXES = {"pyd", "pkl", "pickle", "pth", "pt", "ckpt", "joblib", "py", "pyc", "so", "dll", "sh"}
COMPRESSED_SUFFIXES = {"gz", "bz2", "xz", "zst", "zip", "lz4", "tgz"}
# Type flags of members that are neither files nor what describes the next one: links, devices, pipes.
SPECIAL = tuple(b"%d" % flag for flag in (1, 2, 3, 4, 6))
END_MARKER = 1024


@dataclass(frozen=True)
class Fault:
    """Something wrong with a shard, or with one of its samples; `key` is "" for the whole shard."""

    shard: str
    key: str
    kind: str
    reason: str

    def __post_init__(self) -> None:
        assert self.kind in KINDS


def header_faults(path: Path) -> tuple[ShardIndex | None, list[Fault]]:
    """Return a shard's index, None where it cannot be read, and the faults that its headers show."""
    faults: list[Fault] = []
    try:
        entries = list(scan_entries(path))
        if not has_end_marker(path):
            faults.append(Fault(str(path), "", "no_end_marker", "got no end marker, expected 1024 bytes of zeros"))
    except BrokenTarError as error:
        return None, [Fault(str(path), "", error.kind, _reason(error, path))]
    except OSError as error:
        return None, [Fault(str(path), "", "broken_tar", str(error))]
    members = [entry[1:] for entry in entries if entry[0] in REGULAR]
    faults += _special_faults(path, [name for kind, name, _, _ in entries if kind in SPECIAL])
    faults += _member_faults(path, [name for name, _, _ in members])
    if any(fault.kind == "repeated_member" for fault in faults):
        return None, faults
    index = index_members(path, members)
    faults += _dotted_faults(path, [name for name, _, _ in members], set(index.keys))
    return index, faults + _sample_faults(path, index)


def _reason(error: Exception, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")


def _special_faults(path: Path, names: list[str]) -> Iterator[Fault]:
    for name in names:
        yield Fault(str(path), split_name(name)[0], "not_a_file", f"got {name}, a link or device, expected a file")


def _member_faults(path: Path, members: list[str]) -> Iterator[Fault]:
    """Yield what names alone show: members that are there twice, apart from their sample, or dangerous."""
    seen: set[str] = set()
    told: set[str] = set()
    closed: set[str] = set()
    current = ""
    for name in members:
        key, suffix = split_name(name)
        if suffix not in SUFFIXES or _is_unsafe(name):
            yield from _danger(path, name, told)
        if suffix not in SUFFIXES:
            continue
        if f"{key}.{suffix}" in seen:
            yield Fault(str(path), key, "repeated_member", f"got .{suffix} twice, expected each member once")
        elif key != current and key in closed:
            yield Fault(str(path), key, "interleaved_key", f"got .{suffix} apart from the sample's other members")
        seen.add(f"{key}.{suffix}")
        if key != current:
            closed.add(current)
            current = key


def _dotted_faults(path: Path, members: list[str], keys: set[str]) -> Iterator[Fault]:
    """Yield keys of which nothing is read because what they name has more dots; `keys` are those that are read."""
    told: set[str] = set()
    for name in members:
        key, suffix = split_name(name)
        if key not in keys and key not in told and suffix.rpartition(".")[2] in SUFFIXES:
            told.add(key)
            yield Fault(str(path), key, "dotted_key", f"got {name}, whose key ends at the first dot, expected no other")


def _danger(path: Path, name: str, told: set[str]) -> Iterator[Fault]:
    """Yield what is dangerous in a name; each key is told once, and remembered in `told`."""
    key, suffix = split_name(name)
    if _is_unsafe(name) and key not in told:
        told.add(key)
        yield Fault(str(path), key, "unsafe_key", f"got {name}, a path out of its folder")
    parts = set(suffix.split("."))
    if parts & UNSAFE_SUFFIXES:
        yield Fault(str(path), key, "unsafe_member", f"got .{suffix}, which is never read")
    elif parts & COMPRESSED_SUFFIXES:
        yield Fault(str(path), key, "compressed_member", f"got .{suffix}, which is never inflated")


def _is_unsafe(name: str) -> bool:
    return name.startswith("/") or (".." in name and ".." in name.split("/")) or "\\" in name


def _sample_faults(path: Path, index: ShardIndex) -> list[Fault]:
    """Return what the index shows: samples without an image, with several, or with too large a member."""
    if not len(index):
        return [Fault(str(path), "", "no_samples", "got a tar without a sample")]
    faults = []
    for row, key in enumerate(index.keys):
        members = index.members(row)
        images = [suffix for suffix in IMAGE_SUFFIXES if suffix in members]
        if not images and "npy" not in members:
            faults.append(Fault(str(path), key, "no_image", f"got {sorted(members)}, expected an image or moments"))
        if len(images) > 1:
            faults.append(Fault(str(path), key, "several_images", f"got {images}, expected one image"))
        for suffix, (_, size) in members.items():
            if size > MAX_BYTES[suffix]:
                reason = f"got {size} bytes in .{suffix}, expected at most {MAX_BYTES[suffix]}"
                faults.append(Fault(str(path), key, "oversized_member", reason))
    return faults


def has_end_marker(path: Path) -> bool:
    """Say whether a tar ends as one does: with 1024 bytes of zeros."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - END_MARKER))
        tail = stream.read(END_MARKER)
    return len(tail) == END_MARKER and not tail.strip(b"\0")
