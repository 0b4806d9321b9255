"""A shard's index kept beside it, so that reading starts without a scan of its headers."""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ldm.data.shards import ShardIndex, index_shard
from ldm.files import write_bytes

# Part of every file; another number is another layout, and the shard is scanned again.
LAYOUT = 2
# Between the keys of a file, which cannot hold it: names in a tar end at it.
END = "\0"


def index_path(shard: str | os.PathLike[str]) -> Path:
    """Return where the index of a shard is kept: 00000.index.safetensors beside 00000.tar."""
    return Path(shard).with_suffix(".index.safetensors")


def save_index(index: ShardIndex, *, stamp: tuple[int, int]) -> Path:
    """Write an index beside its shard, in one step; `stamp` is the shard's (size, mtime) before it was scanned."""
    keys = END.join(index.keys).encode("utf-8", errors="surrogateescape")
    arrays: dict[str, np.ndarray] = {
        "keys": np.frombuffer(keys, dtype=np.uint8),
        "offsets": np.ascontiguousarray(index.offsets, dtype=np.int64),
        "sizes": np.ascontiguousarray(index.sizes, dtype=np.int64),
        "stamp": np.array([LAYOUT, *stamp, len(index), _sum(keys)], dtype=np.int64),
    }
    path = index_path(index.path)
    write_bytes(path, save(arrays, metadata={"suffixes": json.dumps(index.suffixes)}))
    return path


def read_index(shard: str | os.PathLike[str], *, stamp: tuple[int, int] | None = None) -> ShardIndex | None:
    """Return the index kept beside a shard, or None where there is none that was made of this very file.

    `stamp` is the (size, mtime) to go by, the file's own unless given: a remote shard need not be there.
    """
    path, shard = index_path(shard), Path(shard)
    if not path.is_file():
        return None
    try:
        arrays, suffixes = load_file(path), _suffixes(path)
    except (SafetensorError, OSError, ValueError):
        return None
    stamp = stamp or stamp_of(shard)
    return _index_of(shard, arrays, suffixes, stamp) if _is_whole(arrays, len(suffixes), stamp) else None


def open_index(shard: str | os.PathLike[str]) -> ShardIndex:
    """Return a shard's index: the one kept beside it where that is valid, else a scan of its headers.

    Raises ValueError as `index_shard` does.
    """
    return read_index(shard) or index_shard(shard)


def stamp_of(shard: str | os.PathLike[str]) -> tuple[int, int]:
    """Return what a file changes with: its size in bytes and its time of modification in nanoseconds."""
    status = Path(shard).stat()
    return status.st_size, status.st_mtime_ns


def _suffixes(path: Path) -> tuple[str, ...]:
    # safetensors.numpy gives the arrays alone; its header is eight bytes of length and that much json.
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return tuple(json.loads(header["__metadata__"]["suffixes"]))


def _is_whole(arrays: Mapping[str, np.ndarray], num_suffixes: int, stamp: tuple[int, int]) -> bool:
    """Say whether the arrays belong to a file of this stamp and to each other."""
    if set(arrays) != {"keys", "offsets", "sizes", "stamp"} or arrays["stamp"].shape != (5,):
        return False
    layout, size, modified, num_samples, checksum = arrays["stamp"].tolist()
    shape = (num_samples, num_suffixes)
    fits = arrays["offsets"].shape == shape and arrays["sizes"].shape == shape
    inside = fits and bool((arrays["offsets"] + arrays["sizes"] <= size).all() and (arrays["offsets"] >= 0).all())
    return inside and (layout, size, modified) == (LAYOUT, *stamp) and _sum(arrays["keys"].tobytes()) == checksum


def _index_of(
    shard: Path, arrays: Mapping[str, np.ndarray], suffixes: tuple[str, ...], stamp: tuple[int, int]
) -> ShardIndex:
    text = arrays["keys"].tobytes().decode("utf-8", errors="surrogateescape")
    keys = tuple(text.split(END)) if len(arrays["sizes"]) else ()
    return ShardIndex(shard, keys, suffixes, arrays["offsets"], arrays["sizes"], stamp)


def _sum(keys: bytes) -> int:
    return zlib.crc32(keys)
