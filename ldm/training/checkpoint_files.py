"""The checkpoint protocol: a checkpoint is a folder whose manifest, written last, fits every byte in it.

On this machine a new checkpoint is filled under a temporary name beside its own and renamed when it is whole. One that
exists is written over in place: the new files take names that the old manifest does not use, and replacing the
manifest is the one moment in which the old checkpoint becomes the new one. The same holds in remote stores (any address
that fsspec knows), where nothing can be renamed. So a reader finds the old checkpoint or the new one, never a mixture.

Single `.ckpt` files of the former format are checkpoints too: they carry the checksums of their zip archive.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from fsspec.core import url_to_fs  # type: ignore[import-untyped]

MANIFEST = "manifest.json"
_CHUNK = 1 << 20

Place: TypeAlias = Path | str
Writer: TypeAlias = Callable[[BinaryIO], None]


class StorageError(OSError):
    """A checkpoint could not be written, or the place for it is unusable; said in one line."""


class Damaged(ValueError):
    """What lies at a checkpoint's place is no valid checkpoint; says why."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Args:
        files: for each part its "file", "bytes" and "sha256".
        facts: about the run: the step, the number of processes, versions.
    """

    files: dict[str, dict[str, Any]]
    facts: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(record["bytes"] for record in self.files.values())

    def text(self) -> bytes:
        """The file's content; its own digest is part of it, so that no byte can change unseen."""
        content = {"format": 1, "facts": self.facts, "files": self.files}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return (json.dumps({**content, "sha256": digest}, indent=2, sort_keys=True) + "\n").encode()


def write(place: Place, parts: Mapping[str, Writer], *, facts: Mapping[str, Any]) -> Manifest:
    """Writes a checkpoint of the parts, each a function that writes a file's bytes; replaces one of the same name.

    Raises:
        OSError: the disk refused; what was there before is as it was.
    """
    path = local_path(place)
    if path is None:
        return _fill(place, parts, facts)
    if path.is_dir() and manifest_or_none(path) is None:
        quarantine(path)
    if path.is_dir():
        return _fill(path, parts, facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_temporaries(path)
    temporary = temporary_beside(path)
    try:
        manifest = _fill(temporary, parts, facts)
        put_in_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def seal(folder: Path, *, facts: Mapping[str, Any]) -> Manifest:
    """Makes a checkpoint of a folder that others have filled: flushes and hashes its files and writes the manifest."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    records = {name: {"file": name, **_flushed(folder / name)} for name in names if name != MANIFEST}
    manifest = Manifest(records, dict(facts))
    flush_folder(folder)
    _put(folder, MANIFEST, lambda file: _write_all(file, manifest.text()))
    return manifest


def put_in_place(temporary: Path, path: Path) -> None:
    """Renames a whole folder to its final name; what is there keeps a checkpoint's name until it is replaced."""
    former = path.with_suffix(f".former{path.suffix}")
    if path.exists():
        delete(former)
        path.rename(former)
    temporary.rename(path)
    flush_folder(path.parent)
    delete(former)


def read_manifest(place: Place) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        Damaged: there is none, or it is not as it was written.
    """
    fs, root = url_to_fs(str(place))
    try:
        text = fs.cat_file(f"{root}/{MANIFEST}")
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged("it has no manifest") from None
    try:
        content = json.loads(text)
        manifest = Manifest(content["files"], content["facts"])
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged("its manifest is unreadable") from error
    if manifest.text() != text:
        raise Damaged("its manifest is not as it was written")
    for record in manifest.files.values():
        if Path(record["file"]).is_absolute() or ".." in Path(record["file"]).parts:
            raise Damaged(f"its manifest names {record['file']}, a file outside of it")
    return manifest


def verify(place: Place) -> None:
    """Reads every byte of a checkpoint and compares checksums; unpickles nothing.

    Raises:
        Damaged: something is missing or not as it was written.
    """
    fs, root = url_to_fs(str(place))
    if fs.isfile(root):
        _verify_archive(place)
        return
    for record in read_manifest(place).files.values():
        try:
            with fs.open(f"{root}/{record['file']}", "rb") as file:
                found = _hashed(file)
        except FileNotFoundError:
            raise Damaged(f"{record['file']} is missing") from None
        except OSError as error:
            raise Damaged(f"{record['file']} cannot be read ({error.strerror or error})") from error
        if found["bytes"] != record["bytes"]:
            raise Damaged(f"{record['file']} has {found['bytes']} bytes, not {record['bytes']}")
        if found != {"bytes": record["bytes"], "sha256": record["sha256"]}:
            raise Damaged(f"{record['file']} is not as it was written")


def is_valid(place: Place) -> bool:
    """Whether every byte of a checkpoint is there as it was written."""
    try:
        verify(place)
    except Damaged:
        return False
    return True


def quarantine(path: Path) -> Path:
    """Renames a damaged checkpoint to `*.corrupt`, so that it is neither read nor removed; returns the new name."""
    number, aside = 2, path.with_name(f"{path.name}.corrupt")
    while aside.exists():
        number, aside = number + 1, path.with_name(f"{path.name}.corrupt-{number}")
    path.rename(aside)
    flush_folder(path.parent)
    return aside


def local_path(place: Place) -> Path | None:
    """The path on this machine's disks, or None for an address of a remote store."""
    if isinstance(place, Path):
        return place
    if "://" not in place:
        return Path(place)
    return Path(url_to_fs(place)[1]) if place.startswith(("file://", "local://")) else None


class _Hashing:
    """Hands bytes on to a file, counting and hashing them on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.digest.update(view)
        self.num_bytes += view.nbytes
        self.file.write(data)
        return view.nbytes

    def flush(self) -> None:
        self.file.flush()

    def record(self) -> dict[str, Any]:
        return {"bytes": self.num_bytes, "sha256": self.digest.hexdigest()}


def _fill(place: Place, parts: Mapping[str, Writer], facts: Mapping[str, Any]) -> Manifest:
    """Writes the parts under names that the present manifest does not use, then the manifest."""
    path, previous = local_path(place), manifest_or_none(place)
    taken = {record["file"] for record in previous.files.values()} if previous else set()
    if path is not None:
        path.mkdir(exist_ok=True)
    try:
        names = {part: _unused(part, taken) for part in parts}
        files = {part: {"file": names[part], **_put(place, names[part], writer)} for part, writer in parts.items()}
        manifest = Manifest(files, dict(facts))
        if path is not None:
            flush_folder(path)
        _put(place, MANIFEST, lambda file: _write_all(file, manifest.text()))
    except BaseException:
        if previous is not None:
            drop_unlisted(place, previous)
        raise
    if path is not None:
        flush_folder(path)
    drop_unlisted(place, manifest)
    return manifest


def _put(place: Place, name: str, writer: Writer) -> dict[str, Any]:
    """Writes one file whole or not at all; returns its size and checksum."""
    path = local_path(place)
    if path is None:
        fs, root = url_to_fs(str(place))
        with fs.open(f"{root}/{name}", "wb") as file:
            hashing = _Hashing(file)
            writer(hashing)  # type: ignore[arg-type]
        return hashing.record()
    temporary = path / f".{name}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        hashing = _Hashing(file)
        writer(hashing)  # type: ignore[arg-type]
        _flush(file)
    temporary.replace(path / name)
    return hashing.record()


def _flush(file: BinaryIO) -> None:
    """Brings a file's bytes to the disk and out of memory, so that verifying reads the disk."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flush_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flushed(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return _hashed(file)


def _hashed(file: Any) -> dict[str, Any]:
    digest, num_bytes = hashlib.sha256(), 0
    while block := file.read(_CHUNK):
        digest.update(block)
        num_bytes += len(block)
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}


def _write_all(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _verify_archive(place: Place) -> None:
    try:
        fs, root = url_to_fs(str(place))
        with fs.open(root, "rb") as file, zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise Damaged("its archive is not whole") from error
    if broken is not None:
        raise Damaged(f"{broken} is not as it was written")


def manifest_or_none(place: Place) -> Manifest | None:
    try:
        return read_manifest(place)
    except Damaged:
        return None


def _unused(name: str, taken: set[str]) -> str:
    """`weights.safetensors`, or `weights.2.safetensors` where the present checkpoint uses the former."""
    stem, dot, suffix = name.partition(".")
    return name if name not in taken else f"{stem}.2{dot}{suffix}"


def drop_unlisted(place: Place, manifest: Manifest) -> list[str]:
    """Removes the files of a checkpoint folder that its manifest does not name; returns their names."""
    fs, root = url_to_fs(str(place))
    listed = {MANIFEST, *(record["file"] for record in manifest.files.values())}
    names = [found.removeprefix(root).lstrip("/") for found in fs.find(root)]
    unlisted = [name for name in names if name not in listed]
    for name in unlisted:
        fs.rm_file(f"{root}/{name}")
    return unlisted


def temporary_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")


def _clear_temporaries(path: Path) -> None:
    """Removes what earlier, killed attempts at this same checkpoint left."""
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        delete(stale)


def delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
