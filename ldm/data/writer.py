"""Write WebDataset shards in the layout of img2dataset / LAION, with bytes that depend on the records alone."""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.files import write_bytes

MANIFEST = "manifest.json"
# Marks a folder whose shards are being written, so that a killed run may be written over.
IN_PROGRESS = ".writing"
IMAGE_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
# Pillow's name of what is stored as it is, and its suffix; MPO is a JPEG that holds more pictures behind the first.
SUFFIX_OF = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
MAX_SAMPLES_PER_SHARD = 10_000
SHARD_NAME = re.compile(r"\d{5,}\.tar")


@dataclass(frozen=True)
class Record:
    """One image with its caption, on its way into a shard.

    `image` is a PIL image, a uint8 array (H, W, 3), or encoded bytes, which are stored as they are;
    `original_size` is (width, height) before any resizing, the image's own size when None.
    """

    image: Image.Image | np.ndarray | bytes
    caption: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    original_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class LatentRecord:
    """Autoencoder moments (M, h, w) float32, unscaled, of one image, with its caption."""

    moments: np.ndarray
    caption: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One sample ready to be written: its payload's suffix and bytes, what we say of it, and the record's columns."""

    suffix: str
    payload: bytes
    caption: str
    facts: dict[str, Any]
    columns: Mapping[str, Any]

    def __post_init__(self) -> None:
        clash = {"key", "caption", *self.facts} & set(self.columns)
        if clash:
            raise ValueError(f"columns: got {sorted(clash)}, which the writer states itself; leave them out")


def write_shards(
    folder: str | os.PathLike[str],
    records: Iterable[Record],
    *,
    samples_per_shard: int = 1000,
    image_format: str = "png",
    quality: int = 95,
) -> dict[str, Any]:
    """Write image records as `00000.tar`, `00001.tar`, ... and, last of all, `manifest.json`; return the manifest.

    Members are `{shard:05d}{i:04d}.png|jpg|webp`, `.txt` and `.json` (key, caption, width, height, original_width,
    original_height, sha256 of the image's bytes, status, and the record's own columns). `quality` is JPEG's and WebP's.
    Raises ValueError for an unknown format, a wrong shard size, an empty set, or a folder with foreign shards.
    """
    check_format(image_format, quality)
    samples = (image_sample(record, image_format=image_format, quality=quality) for record in records)
    return _write_set(Path(folder), samples, samples_per_shard=samples_per_shard, facts={})


def write_latent_shards(
    folder: str | os.PathLike[str],
    records: Iterable[LatentRecord],
    *,
    encoder_sha256: str,
    samples_per_shard: int = 1000,
) -> dict[str, Any]:
    """Write moments as shards whose members are `.npy`, `.txt` and `.json`; return the manifest.

    The manifest and every json carry `encoder_sha256`, so that latents of two encoders can never be mixed.
    Raises ValueError as `write_shards` does, and for moments that are not (M, h, w).
    """
    samples = (_latent_sample(record, encoder_sha256) for record in records)
    facts = {"encoder_sha256": encoder_sha256}
    return _write_set(Path(folder), samples, samples_per_shard=samples_per_shard, facts=facts)


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the manifest of a finished set of shards, or None where there is none."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return manifest


def check_format(image_format: str, quality: int) -> None:
    """Raise ValueError for a format that is not one of IMAGE_FORMATS, or a quality that is not 1 to 100."""
    if image_format not in IMAGE_FORMATS:
        raise ValueError(f"image_format: got {image_format!r}, expected one of {sorted(IMAGE_FORMATS)}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality: got {quality}, expected 1 to 100")


def image_sample(record: Record, *, image_format: str, quality: int) -> Sample:
    """Return an image record ready to be written, encoded unless it holds bytes; raises what Pillow raises."""
    payload, suffix, (width, height) = _encoded(record.image, image_format=image_format, quality=quality)
    original_width, original_height = record.original_size or (width, height)
    facts = {
        "width": width,
        "height": height,
        "original_width": original_width,
        "original_height": original_height,
        "sha256": hashlib.sha256(payload).hexdigest(),
        "status": "success",
    }
    return Sample(suffix, payload, record.caption, facts, record.columns)


def _encoded(
    image: Image.Image | np.ndarray | bytes, *, image_format: str, quality: int
) -> tuple[bytes, str, tuple[int, int]]:
    """Return the image's bytes, its suffix and its (width, height)."""
    if isinstance(image, bytes):
        with Image.open(io.BytesIO(image)) as opened:
            suffix = SUFFIX_OF.get(opened.format or "")
            if suffix is None:
                raise ValueError(f"image bytes: got format {opened.format}, expected JPEG, PNG or WEBP")
            return image, suffix, opened.size
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if image_format == "jpg":  # which knows neither palettes nor transparency
        picture = picture.convert("RGB")
    options = {} if image_format == "png" else {"quality": quality}
    stream = io.BytesIO()
    picture.save(stream, format=IMAGE_FORMATS[image_format], **options)
    return stream.getvalue(), image_format, picture.size


def _latent_sample(record: LatentRecord, encoder_sha256: str) -> Sample:
    moments = np.ascontiguousarray(record.moments, dtype=np.float32)
    if moments.ndim != 3:
        raise ValueError(f"moments: got shape {moments.shape}, expected (M, h, w), the moments of one image")
    stream = io.BytesIO()
    np.save(stream, moments, allow_pickle=False)
    facts = {"encoder_sha256": encoder_sha256, "shape": list(moments.shape), "status": "success"}
    return Sample("npy", stream.getvalue(), record.caption, facts, record.columns)


def check_shard_size(samples_per_shard: int) -> None:
    """Raise ValueError for a number of samples that the keys of a shard cannot count."""
    if not 1 <= samples_per_shard <= MAX_SAMPLES_PER_SHARD:
        raise ValueError(f"samples_per_shard: got {samples_per_shard}, expected 1 to {MAX_SAMPLES_PER_SHARD}")


class ShardFile:
    """One shard being written: `00003.tar` of number 3, which is there only when it is whole.

    Use as `add` for each sample, then `close`; a shard that is not closed leaves a hidden file that nobody reads.
    """

    def __init__(self, folder: str | os.PathLike[str], number: int) -> None:
        from webdataset.writer import TarWriter  # which imports torch; reading a manifest need not wait for it

        self.path = Path(folder) / f"{number:05d}.tar"
        self.number = number
        self.num_samples = 0
        self.columns: set[str] = set()
        self._temporary = self.path.with_name(f".{self.path.name}.tmp")
        self._stream = self._temporary.open("w+b")
        self._tar = TarWriter(self._stream, encoder=False, mtime=0, user="", group="", compress=False)

    def add(self, sample: Sample) -> None:
        """Append a sample under the next key."""
        key = f"{self.number:05d}{self.num_samples:04d}"
        row = {"key": key, "caption": sample.caption, **sample.facts, **sample.columns}
        members = {sample.suffix: sample.payload, "txt": sample.caption.encode(), "json": json.dumps(row).encode()}
        self._tar.write({"__key__": key, **members})
        self.num_samples += 1
        self.columns.update(sample.columns)

    def close(self) -> dict[str, Any]:
        """Put the shard in its place, on disk, and return its entry of the manifest."""
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.seek(0)
        sha256 = hashlib.file_digest(self._stream, "sha256").hexdigest()
        size = self._stream.tell()
        self._stream.close()
        self._temporary.replace(self.path)
        return {"name": self.path.name, "num_samples": self.num_samples, "bytes": size, "sha256": sha256}

    def abandon(self) -> None:
        """Leave the shard unwritten."""
        with suppress(OSError):  # a full disk may be why
            self._tar.close()
        with suppress(OSError):
            self._stream.close()
        self._temporary.unlink(missing_ok=True)


def write_manifest(
    folder: Path, shards: list[dict[str, Any]], *, columns: set[str], facts: dict[str, Any]
) -> dict[str, Any]:
    """Write manifest.json, which says that the set is whole, take the mark of an unfinished one away, and return it."""
    num_samples = sum(shard["num_samples"] for shard in shards)
    manifest = {"num_samples": num_samples, "columns": sorted(columns), **facts, "shards": shards}
    write_bytes(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    (folder / IN_PROGRESS).unlink(missing_ok=True)
    return manifest


def claim(folder: Path) -> None:
    """Make the folder ours and empty of shards; raises ValueError where shards lie that nobody here wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    old = [path for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name)]
    ours = (folder / MANIFEST).exists() or (folder / IN_PROGRESS).exists()
    if old and not ours:
        raise ValueError(f"folder: got {folder}, which holds {old[0].name} without {MANIFEST}; choose an empty folder")
    (folder / IN_PROGRESS).write_bytes(b"")
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in [*old, *folder.glob(".*.tmp")]:
        path.unlink()


def _write_set(
    folder: Path, samples: Iterator[Sample], *, samples_per_shard: int, facts: dict[str, Any]
) -> dict[str, Any]:
    check_shard_size(samples_per_shard)
    claim(folder)
    shards: list[dict[str, Any]] = []
    columns: set[str] = set()
    for first in samples:
        shard = ShardFile(folder, len(shards))
        try:
            for sample in chain([first], islice(samples, samples_per_shard - 1)):
                shard.add(sample)
        except BaseException:
            shard.abandon()
            raise
        shards.append(shard.close())
        columns |= shard.columns
    if not shards:
        raise ValueError(f"records: got none to write to {folder}, expected at least one")
    return write_manifest(folder, shards, columns=columns, facts=facts)
