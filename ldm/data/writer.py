"""Write WebDataset shards in the layout of img2dataset / LAION, with bytes that depend on the records alone."""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MANIFEST = "manifest.json"
# Marks a folder whose shards are being written, so that a killed run may be written over.
IN_PROGRESS = ".writing"
IMAGE_FORMATS = {"png": "PNG", "jpg": "JPEG"}
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
class _Sample:
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

    Members are `{shard:05d}{i:04d}.png|jpg`, `.txt` and `.json` (key, caption, width, height, original_width,
    original_height, sha256 of the image's bytes, status, and the record's own columns). `quality` is JPEG's.
    Raises ValueError for an unknown format, a wrong shard size, an empty set, or a folder with foreign shards.
    """
    if image_format not in IMAGE_FORMATS:
        raise ValueError(f"image_format: got {image_format!r}, expected one of {sorted(IMAGE_FORMATS)}")
    samples = (_image_sample(record, image_format=image_format, quality=quality) for record in records)
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


def _image_sample(record: Record, *, image_format: str, quality: int) -> _Sample:
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
    return _Sample(suffix, payload, record.caption, facts, record.columns)


def _encoded(
    image: Image.Image | np.ndarray | bytes, *, image_format: str, quality: int
) -> tuple[bytes, str, tuple[int, int]]:
    """Return the image's bytes, its suffix and its (width, height)."""
    if isinstance(image, bytes):
        with Image.open(io.BytesIO(image)) as opened:
            suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}.get(opened.format or "")
            if suffix is None:
                raise ValueError(f"image bytes: got format {opened.format}, expected JPEG, PNG or WEBP")
            return image, suffix, opened.size
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if image_format == "jpg":  # which knows neither palettes nor transparency
        picture = picture.convert("RGB")
    options = {"quality": quality} if image_format == "jpg" else {}
    stream = io.BytesIO()
    picture.save(stream, format=IMAGE_FORMATS[image_format], **options)
    return stream.getvalue(), image_format, picture.size


def _latent_sample(record: LatentRecord, encoder_sha256: str) -> _Sample:
    moments = np.ascontiguousarray(record.moments, dtype=np.float32)
    if moments.ndim != 3:
        raise ValueError(f"moments: got shape {moments.shape}, expected (M, h, w), the moments of one image")
    stream = io.BytesIO()
    np.save(stream, moments, allow_pickle=False)
    facts = {"encoder_sha256": encoder_sha256, "shape": list(moments.shape), "status": "success"}
    return _Sample("npy", stream.getvalue(), record.caption, facts, record.columns)


def _write_set(
    folder: Path, samples: Iterator[_Sample], *, samples_per_shard: int, facts: dict[str, Any]
) -> dict[str, Any]:
    if not 1 <= samples_per_shard <= MAX_SAMPLES_PER_SHARD:
        raise ValueError(f"samples_per_shard: got {samples_per_shard}, expected 1 to {MAX_SAMPLES_PER_SHARD}")
    _claim(folder)
    shards: list[dict[str, Any]] = []
    columns: set[str] = set()
    while batch := list(islice(samples, samples_per_shard)):
        shards.append(_write_shard(folder, len(shards), batch))
        columns.update(*(sample.columns for sample in batch))
    if not shards:
        raise ValueError(f"records: got none to write to {folder}, expected at least one")
    num_samples = sum(shard["num_samples"] for shard in shards)
    manifest = {"num_samples": num_samples, "columns": sorted(columns), **facts, "shards": shards}
    _replace(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    (folder / IN_PROGRESS).unlink()
    return manifest


def _claim(folder: Path) -> None:
    """Make the folder ours and empty of shards; shards that this module did not write are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    old = [path for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name)]
    ours = (folder / MANIFEST).exists() or (folder / IN_PROGRESS).exists()
    if old and not ours:
        raise ValueError(f"folder: got {folder}, which holds {old[0].name} without {MANIFEST}; choose an empty folder")
    (folder / IN_PROGRESS).touch()
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in [*old, *folder.glob(".*.tmp")]:
        path.unlink()


def _write_shard(folder: Path, shard: int, samples: list[_Sample]) -> dict[str, Any]:
    from webdataset.writer import TarWriter  # which imports torch; reading a manifest need not wait for it

    stream = io.BytesIO()
    with TarWriter(stream, encoder=False, mtime=0, user="", group="", compress=False) as tar:
        for i, sample in enumerate(samples):
            key = f"{shard:05d}{i:04d}"
            row = {"key": key, "caption": sample.caption, **sample.facts, **sample.columns}
            members = {sample.suffix: sample.payload, "txt": sample.caption.encode(), "json": json.dumps(row).encode()}
            tar.write({"__key__": key, **members})
    content = stream.getvalue()
    name = f"{shard:05d}.tar"
    _replace(folder / name, content)
    sha256 = hashlib.sha256(content).hexdigest()
    return {"name": name, "num_samples": len(samples), "bytes": len(content), "sha256": sha256}


def _replace(path: Path, content: bytes) -> None:
    """Put content at path in one step: a killed run leaves the old file, the new one or none, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
