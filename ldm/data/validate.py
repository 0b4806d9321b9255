"""`ldm data validate`: every fault of every shard, by shard and key, with bounded memory."""

import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ldm.data.captions import caption_of
from ldm.data.embeddings import HASH
from ldm.data.faults import KINDS, Fault, header_faults
from ldm.data.parallel import map_in_order
from ldm.data.readable import open_whole_samples
from ldm.data.shards import (
    DECODERS,
    IMAGE_SUFFIXES,
    MAX_BYTES,
    MAX_PIXELS,
    ShardIndex,
    ShardReader,
    decode_json,
    resolve_shards,
)
from ldm.data.writer import read_manifest

# What Pillow may open; a file of another format is a broken image, whatever its name.
FORMATS = ("JPEG", "PNG", "WEBP")
ORIENTATION = 0x0112
# What a sample's json says encoded it.
HASHES = ("encoder_sha256", HASH)
Found = tuple[str, str]


@dataclass(frozen=True)
class Checks:
    """How closely to look: `decode` decodes every image to its end; `min_side` is the least side in pixels."""

    decode: bool = True
    min_side: int = 2

    def __post_init__(self) -> None:
        if self.min_side < 1:
            raise ValueError(f"min_side: got {self.min_side}, expected pixels, at least 1")


@dataclass(frozen=True)
class Verdict:
    """What was found in a set of shards."""

    num_shards: int
    num_samples: int
    faults: list[Fault]

    @property
    def counts(self) -> dict[str, int]:
        """How many faults there are of each kind, in the order of KINDS, without kinds that are not there."""
        found = Counter(fault.kind for fault in self.faults)
        return {kind: found[kind] for kind in KINDS if found[kind]}

    def as_json(self) -> dict[str, Any]:
        """Return everything as json can hold it."""
        return {**asdict(self), "counts": self.counts}


def validate_shards(
    shards: str | os.PathLike[str] | Sequence[str],
    *,
    checks: Checks | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verdict:
    """Look at every member of every shard that training would read; `progress` is told shards done and in all.

    Raises FileNotFoundError or ValueError where no shards are named.
    """
    paths = resolve_shards(shards)
    faults: list[Fault] = []
    encoders: dict[str, Any] = {}
    num_samples = 0
    look = partial(check_shard, checks=checks or Checks(), stated=_stated_counts(paths))
    for done, (count, found, stated) in enumerate(map_in_order(look, paths, workers=workers), start=1):
        num_samples += count
        faults += found
        for kind, reason in _foreign(stated, encoders, first="first shard") if stated else ():
            faults.append(Fault(str(paths[done - 1]), "", kind, reason))
        progress(done, len(paths))
    return Verdict(len(paths), num_samples, faults)


def check_shard(
    path: Path, *, checks: Checks, stated: Mapping[Path, int] | None = None
) -> tuple[int, list[Fault], dict[str, Any]]:
    """Return a shard's number of samples, its faults, and what its first sample states of what encoded it.

    `stated` are the numbers of samples that manifests give.
    """
    index, faults = header_faults(path)
    is_cut_off = index is None
    if index is None:
        try:
            index, _ = open_whole_samples(path)
        except ValueError:
            return 0, faults, {}
    expected = (stated or {}).get(path, len(index))
    if expected != len(index) and not is_cut_off:
        reason = f"got {len(index)} samples, expected {expected} as its manifest says"
        faults.append(Fault(str(path), "", "wrong_count", reason))
    reader, encoders = ShardReader(), dict[str, Any]()
    for row, key in enumerate(index.keys):
        found = check_sample(index, row, reader, checks, encoders)
        faults += [Fault(str(path), key, kind, reason) for kind, reason in found]
    reader.close()
    return len(index), faults, encoders


def check_sample(
    index: ShardIndex, row: int, reader: ShardReader, checks: Checks, encoders: dict[str, Any] | None = None
) -> Iterator[Found]:
    """Yield (kind, reason) of every fault of a sample's members; members that are too large are not read.

    `encoders` are the hashes that the shard's samples state of what encoded them; the first to come fills them in.
    """
    members = {suffix: place for suffix, place in index.members(row).items() if place[1] <= MAX_BYTES[suffix]}
    captions: list[Any] = [] if members.keys() >= index.members(row).keys() else ["unread"]
    for suffix in members:
        content = reader.read(index.path, *members[suffix])
        if suffix in IMAGE_SUFFIXES:
            yield from check_image(content, checks)
        elif suffix not in ("txt", "json"):
            yield from _attempt(DECODERS[suffix], content, kind="broken_array")
        else:
            if suffix == "json":
                yield from _check_encoders(content, {} if encoders is None else encoders)
            yield from _check_text(suffix, content, captions)
    if not any(captions):
        texts = [f".{suffix}" for suffix in ("txt", "json") if suffix in members]
        found = f"an empty caption in {' and '.join(texts)}" if texts else "neither .txt nor .json"
        yield "missing_caption", f"got {found}, expected words; read as the empty caption"


def check_image(content: bytes, checks: Checks) -> Iterator[Found]:
    """Yield (kind, reason) of every fault of an encoded image; nothing is decoded above MAX_PIXELS."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is told here
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    yield _bomb(f"{image.width} x {image.height} pixels")
                    return
                yield from _image_kinds(image, content, checks)
                if checks.decode:
                    image.load()
    except Image.DecompressionBombError as error:
        yield _bomb(str(error))
    except UnidentifiedImageError:  # whose own words hold an address in memory
        yield "broken_image", f"got no {', '.join(FORMATS)}"
    except Exception as error:  # the data's edge: Pillow raises OSError, SyntaxError, struct.error and more
        yield "broken_image", f"{type(error).__name__}: {error}"


def _image_kinds(image: Image.Image, content: bytes, checks: Checks) -> Iterator[Found]:
    """Yield what the header of an image shows."""
    if image.mode == "CMYK":
        yield "cmyk", "got mode CMYK, expected RGB"
    # A PNG's bits a channel are the 25th byte; Pillow cuts colours of 16 bits to 8 without a word.
    if image.mode.startswith("I") or (image.format == "PNG" and content[24] == 16):
        yield "sixteen_bit", "got 16 bits a channel, expected 8"
    if image.mode == "P":
        yield "palette", "got mode P, expected RGB"
    if image.has_transparency_data:
        yield "transparency", f"got mode {image.mode} with transparency, expected none"
    orientation = image.getexif().get(ORIENTATION, 1)
    if orientation != 1:
        yield "exif_rotated", f"got EXIF orientation {orientation}, expected 1"
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        yield "animated", f"got {frames} frames, expected 1"
    if min(image.size) < checks.min_side:
        yield "tiny_image", f"got {image.width} x {image.height} pixels, expected {checks.min_side} a side or more"


def _check_text(suffix: str, content: bytes, captions: list[Any]) -> Iterator[Found]:
    """Yield what is wrong with a .txt or .json, and add its caption to the list."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        captions.append("unread")  # there is one, in another encoding
        yield "not_utf8", f".{suffix}: {error}"
        return
    if suffix == "txt":
        captions.append(text.strip())
        return
    try:
        captions.append(caption_of(None, decode_json(content)))
    except (ValueError, RecursionError) as error:
        captions.append("unread")
        yield "broken_json", f"{type(error).__name__}: {error}"


def _check_encoders(content: bytes, encoders: dict[str, Any]) -> Iterator[Found]:
    """Yield an encoder that is another one than that of the shard's samples before."""
    with suppress(ValueError, RecursionError):  # told by `_check_text`
        yield from _foreign(decode_json(content), encoders, first="first sample")


def _foreign(row: Mapping[str, Any], encoders: dict[str, Any], *, first: str) -> Iterator[Found]:
    """Yield each hash of a row that is another one than that of the first, which is noted in `encoders`."""
    for name in HASHES:
        if encoders.setdefault(name, row.get(name)) != row.get(name):
            told = [str(value)[:12] for value in (row.get(name), encoders[name])]
            yield "foreign_moments", f"got {name} {told[0]}, expected {told[1]} as in the {first}"


def _attempt(decoder: Callable[[bytes], Any], content: bytes, *, kind: str) -> Iterator[Found]:
    try:
        decoder(content)
    except Exception as error:  # the data's edge, as above
        yield kind, f"{type(error).__name__}: {error}"


def _bomb(size: str) -> Found:
    return "image_bomb", f"got {size}, expected at most {MAX_PIXELS}"


def _stated_counts(paths: Sequence[Path]) -> dict[Path, int]:
    """Return the numbers of samples that the manifests beside the shards state."""
    folders = {path.parent for path in paths}
    return {
        folder / entry["name"]: entry["num_samples"]
        for folder in folders
        for entry in (read_manifest(folder) or {}).get("shards", [])
    }
