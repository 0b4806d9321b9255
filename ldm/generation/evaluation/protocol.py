"""What goes with a measured value: everything that it depends on."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ldm.data.writer import MANIFEST, read_manifest
from ldm.generation.pipeline import SamplingSettings

PACKAGES = (
    "ldm",
    "torch",
    "torchmetrics",
    "torchvision",
    "numpy",
    "pillow",
    "torch-fidelity",
    "open-clip-torch",
    "transformers",
)


def describe_settings(settings: SamplingSettings) -> dict[str, Any]:
    """Sampling settings as plain values: class names, numbers."""
    return {
        "sampler": {"name": type(settings.sampler).__name__, **plain(settings.sampler)},
        "discretization": {"name": type(settings.discretization).__name__, **plain(settings.discretization)},
        "steps": settings.num_steps,
        "guidance": plain(settings.guidance),
        "image_size": list(settings.size),
    }


def versions() -> dict[str, str]:
    """Versions of the software that decides a value."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def plain(part: object) -> dict[str, Any]:
    """The attributes of an object that JSON can hold; infinity, which it cannot, as "inf"."""
    return {key: _written(value) for key, value in vars(part).items() if is_plain(value)}


def is_plain(value: object) -> bool:
    """Whether a value is a text, a number, nothing, or a list of these."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _written(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_written(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def whole_folder(paths: Sequence[str]) -> str | list[str]:
    """The folder of which these are all the shards, or else their list."""
    folder = Path(paths[0]).parent
    return str(folder) if sorted(map(str, folder.glob("*.tar"))) == list(paths) else list(paths)


def described(path: str | list[str], count: int, sha256: str, resolution: int | None) -> dict[str, Any]:
    """What a protocol says of images."""
    path = str(Path(path).absolute()) if isinstance(path, str) else [str(Path(part).absolute()) for part in path]
    crop = None if resolution is None else "short side to it by Pillow's bicubic filter, centre cut out"
    return {"path": path, "count": count, "sha256": sha256, "preprocessing": {"resolution": resolution, "crop": crop}}


def sha256_of_files(files: Iterable[Path], *, known: Mapping[Path, str] | None = None) -> str:
    """SHA-256 of files: their names, without the folder, and their content; `known`: of some, that of the content."""
    digest = hashlib.sha256()
    for file in files:
        own = (known or {}).get(file)
        if own is None:
            with file.open("rb") as stream:
                own = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(file.name.encode() + bytes.fromhex(own))
    return digest.hexdigest()


def known_hashes(shards: Iterable[Path]) -> dict[Path, str]:
    """The SHA-256 that the manifests beside shards say of those of that size that are not newer."""
    by_folder: dict[Path, list[Path]] = {}
    for shard in shards:
        by_folder.setdefault(shard.parent, []).append(shard)
    found = {}
    for folder, files in by_folder.items():
        entries = {entry["name"]: entry for entry in (read_manifest(folder) or {}).get("shards", [])}
        written = (folder / MANIFEST).stat().st_mtime_ns if entries else 0
        for file in files:
            entry, now = entries.get(file.name, {}), file.stat()
            # A shard that was changed after the manifest was written may have another content of the same size.
            if entry.get("sha256") and entry.get("bytes") == now.st_size and now.st_mtime_ns <= written:
                found[file] = entry["sha256"]
    return found
