"""From the bytes of a member to an image, moments, text or a row: nothing is unpickled, and nothing is too large."""

import io
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ldm.data.embeddings import FLIPPED, TEXT, decode_embeddings

# Everything that is ever read out of a shard; other members are left alone, so nothing is unpickled or run.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
SUFFIXES = (*IMAGE_SUFFIXES, "npy", "txt", "json", "cls", FLIPPED, TEXT)
# What Pillow calls their formats.
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 2**26
# A member above these is refused before it is read, so that no sample takes memory without bound.
MAX_BYTES = {**dict.fromkeys((*IMAGE_SUFFIXES, "npy", FLIPPED, TEXT), 2**27), "txt": 2**20, "json": 2**22, "cls": 64}


class CorruptSampleError(ValueError):
    """A sample cannot be read; the message names the shard and the key.

    `kind` is one of `ldm.data.faults.KINDS`; `reason` says it without shard and key.
    """

    def __init__(self, message: str, *, kind: str = "unreadable", reason: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.reason = reason or message


class UnreachableError(OSError):
    """A remote shard cannot be fetched, however often it was tried; the message names the URL."""


class ImageBombError(ValueError):
    """An image has more pixels than are ever decoded."""


class OversizedError(ValueError):
    """A member has more bytes than are ever read."""


def decode_image(content: bytes, *, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Decode bytes, of JPEG, PNG or WebP unless told others, into an upright RGB image; transparency is laid on white.

    Raises ImageBombError for an image above MAX_PIXELS, before it is decoded, and whatever Pillow raises for a bad one.
    """
    with Image.open(io.BytesIO(content), formats=formats) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ImageBombError(f"got {image.width} x {image.height} pixels, expected at most {MAX_PIXELS}")
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255 instead of scaling
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def decode_npy(content: bytes) -> np.ndarray:
    """Return the array of npy bytes, whose memory it may share and not write; raises ValueError for objects."""
    start = 10 + int.from_bytes(content[8:10], "little")
    kind, shape = _npy_header(content[:start])
    if kind is None or start + kind.itemsize * prod(shape) != len(content):
        whole: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
        return whole
    return np.frombuffer(content, kind, offset=start).reshape(shape)


@lru_cache(maxsize=256)
def _npy_header(header: bytes) -> tuple[np.dtype[Any] | None, tuple[int, ...]]:
    """Parse a header, which takes longer than all else and is mostly the same; no dtype for an uncommon one."""
    if header[:8] != b"\x93NUMPY\x01\x00":
        return None, ()
    shape, is_fortran, kind = np.lib.format.read_array_header_1_0(io.BytesIO(header[8:]))
    return (None if is_fortran or kind.hasobject else kind), shape


def decode_moments(content: bytes) -> np.ndarray:
    """Decode npy bytes into moments float32 (M, h, w); raises ValueError for pickled or misshapen arrays."""
    moments = decode_npy(content)
    if moments.ndim != 3 or moments.dtype.kind != "f":
        raise ValueError(f"got moments {moments.dtype} {moments.shape}, expected floats (M, h, w)")
    return moments.astype(np.float32, copy=False)


def decode_json(content: bytes) -> dict[str, Any]:
    """Decode a json object; raises ValueError for anything else."""
    row = json.loads(content)
    if not isinstance(row, dict):
        raise ValueError(f"got a json {type(row).__name__}, expected an object")
    return row


DECODERS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(IMAGE_SUFFIXES, decode_image),
    "npy": decode_moments,
    FLIPPED: decode_moments,
    TEXT: decode_embeddings,
    "txt": bytes.decode,
    "json": decode_json,
    "cls": int,  # a class by number, as webdataset writes it
}


def row_of(decoded: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a sample says of itself: its json, and its class where that is a member of its own."""
    return {name: decoded[name] for name in ("cls",) if name in decoded} | dict(decoded.get("json", {}))


def replace_text(content: bytes) -> str:
    """Decode text whatever its encoding: bytes that are not UTF-8 become the replacement character."""
    return content.decode(errors="replace")


def replace_json(content: bytes) -> dict[str, Any]:
    """Decode a json object as `replace_text` does; what is none counts as an empty one."""
    try:
        return decode_json(replace_text(content).encode())
    except (ValueError, RecursionError):
        return {}


# What `data.bad_text` chooses between.
TEXT_DECODERS = {"skip": DECODERS, "replace": DECODERS | {"txt": replace_text, "json": replace_json}}


def check_size(suffix: str, size: int) -> None:
    """Raise OversizedError for a member that is too large to be read."""
    if size > MAX_BYTES[suffix]:
        raise OversizedError(f"got {size} bytes, expected at most {MAX_BYTES[suffix]} in a .{suffix}")


def fault_kind(suffix: str, error: Exception) -> str:
    """Return the kind of fault, of `ldm.data.faults.KINDS`, that decoding a member ended with."""
    match error:
        case CorruptSampleError():
            return error.kind
        case ImageBombError() | Image.DecompressionBombError() | Image.DecompressionBombWarning():
            return "image_bomb"
        case OversizedError():
            return "oversized_member"
        case UnicodeDecodeError():
            return "not_utf8"
        case OSError() if error.errno is not None:  # Pillow's own have no number
            return "unreadable"
    return "broken_json" if suffix == "json" else "broken_image" if suffix in IMAGE_SUFFIXES else "broken_array"
