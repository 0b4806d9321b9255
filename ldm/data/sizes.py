"""The sizes of pictures, without decoding them, kept beside their shards."""

import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.decoding import UnreachableError, decode_json
from ldm.data.shards import IMAGE_SUFFIXES, ShardIndex, ShardReader
from ldm.files import write_bytes


def picture_sizes(shards: Sequence[ShardIndex], reader: ShardReader) -> np.ndarray:
    """Return every picture's (width, height), int64 (N, 2): as its json says, else as its own header does.

    A picture whose size cannot be read counts as square: reading it will tell what is wrong with it. What is found of a
    shard is kept beside it, where that can be written, for the next run. Raises UnreachableError for a remote shard
    that cannot be fetched.
    """
    return np.concatenate([_kept_sizes(shard, reader) for shard in shards]).astype(np.int64).reshape(-1, 2)


def sizes_path(shard: ShardIndex) -> Path:
    """Return where the sizes of these samples of a shard are kept: 00000.sizes-DIGEST.npy beside 00000.tar."""
    return shard.path.with_suffix(f".sizes-{shard.digest}.npy")


def _kept_sizes(shard: ShardIndex, reader: ShardReader) -> np.ndarray:
    path = sizes_path(shard)
    with suppress(OSError, ValueError, EOFError):
        kept: np.ndarray = np.load(path, allow_pickle=False)
        if kept.shape == (len(shard), 2) and kept.dtype == np.int32 and (kept > 0).all():
            return kept
    sizes = np.array([_size(shard, sample, reader) for sample in range(len(shard))], dtype=np.int32).reshape(-1, 2)
    stream = io.BytesIO()
    np.save(stream, sizes, allow_pickle=False)
    with suppress(OSError):  # of a folder that is only read
        write_bytes(path, stream.getvalue())
    return sizes


def _size(shard: ShardIndex, sample: int, reader: ShardReader) -> tuple[int, int]:
    members = shard.members(sample)
    try:
        if "json" in members:
            row = decode_json(reader.read(shard.path, *members["json"]))
            width, height = row.get("width"), row.get("height")
            if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0 and width + height < 2**31:
                return width, height
        offset, size = next(members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members)
        return _header_size(reader.read(shard.path, offset, size))
    except UnreachableError:
        raise
    except (ValueError, OSError):
        return 1, 1


def _header_size(content: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else image.size
