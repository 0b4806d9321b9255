"""Shards of what encoders said of pictures and captions: whole or not there, and the same bytes every time."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ldm.data.embeddings import FLIPPED, TEXT
from ldm.data.writer import IN_PROGRESS, MANIFEST
from ldm.files import write_bytes

# Beside the shards of each split, what each shard's task has to say; `write_manifest` makes the manifest of them.
TASKS = ".tasks"


@dataclass(frozen=True)
class EncodedSample:
    """What encoders said of one sample.

    Args:
        moments: (M, h, w) floats, unscaled.
        flipped: those of the mirrored picture, or None.
        text: of `ldm.data.embeddings.PARTS`, those that there are; or None.
        row: the sample's json.
    """

    key: str
    caption: str
    row: Mapping[str, Any]
    moments: np.ndarray
    flipped: np.ndarray | None = None
    text: Mapping[str, np.ndarray] | None = None

    def members(self) -> dict[str, bytes]:
        """The sample's members by suffix."""
        arrays = {"npy": self.moments, FLIPPED: self.flipped}
        members = {suffix: npy(array) for suffix, array in arrays.items() if array is not None}
        if self.text is not None:
            members[TEXT] = save({name: np.ascontiguousarray(array) for name, array in sorted(self.text.items())})
        return members | {"txt": self.caption.encode(), "json": json.dumps(dict(self.row)).encode()}


@dataclass
class EncodedShard:
    """A shard on its way to the disk, as a context: the tar takes its name when all samples are in.

    The note of the task (`read_note`), written after it, is what makes the shard count as done.

    Args:
        facts: what the note says besides, and must say for the shard to be taken for the right one.
    """

    folder: Path
    name: str
    facts: Mapping[str, Any]
    num_samples: int = field(default=0, init=False)
    columns: set[str] = field(default_factory=set, init=False)

    def __enter__(self) -> "EncodedShard":
        (self.folder / TASKS).mkdir(parents=True, exist_ok=True)
        (self.folder / IN_PROGRESS).touch()
        self._partial = self.folder / f".{self.name}.{os.getpid()}.tmp"
        self._tar = tarfile.open(self._partial, "w", format=tarfile.GNU_FORMAT)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._tar.close()
        if kind is not None:
            self._partial.unlink(missing_ok=True)

    def add(self, sample: EncodedSample) -> None:
        """Adds a sample."""
        for suffix, content in sample.members().items():
            info = tarfile.TarInfo(f"{sample.key}.{suffix}")
            info.size, info.mode = len(content), 0o444
            self._tar.addfile(info, io.BytesIO(content))
        self.num_samples += 1
        self.columns.update(sample.row)

    def finish(self, *, bad: Iterable[Mapping[str, str]]) -> None:
        """Puts the shard in its place, and then its note, which lists the samples that could not be read.

        A shard without a sample leaves only the note.
        """
        self._tar.close()
        entry: dict[str, Any] = {"name": self.name, "num_samples": self.num_samples}
        if self.num_samples:
            with self._partial.open("rb+") as stream:
                entry |= {"bytes": os.fstat(stream.fileno()).st_size}
                entry |= {"sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
                os.fsync(stream.fileno())
            self._partial.replace(self.folder / self.name)
        else:
            self._partial.unlink()
            (self.folder / self.name).unlink(missing_ok=True)
        note = {**self.facts, "shard": entry, "columns": sorted(self.columns), "bad": list(bad)}
        write_bytes(_note_path(self.folder, self.name), json.dumps(note, indent=1).encode())


def npy(array: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file."""
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


def read_note(folder: Path, name: str, *, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns what a finished task left, None where its shard is missing, of another size or made under other facts."""
    path = _note_path(folder, name)
    try:
        note: dict[str, Any] = json.loads(path.read_bytes())
        entry = note["shard"]
        whole = not entry["num_samples"] or (folder / name).stat().st_size == entry["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return note if whole and all(note.get(name) == value for name, value in facts.items()) else None


def write_manifest(folder: Path, notes: Iterable[Mapping[str, Any]], *, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Writes manifest.json out of the notes of all shards, which makes the folder whole, and returns it.

    Shards of another run in the folder, of which there is no note, are taken away.
    """
    entries, columns = [], set()
    for note in notes:
        columns.update(note["columns"])
        if note["shard"]["num_samples"]:
            entries.append(note["shard"])
    names = {entry["name"] for entry in entries}
    for path in [*folder.glob("*.tar"), *folder.glob(".*.tar.*.tmp")]:
        if path.name not in names:
            path.unlink()
    num_samples = sum(entry["num_samples"] for entry in entries)
    manifest = {"num_samples": num_samples, "columns": sorted(columns), **facts, "shards": entries}
    write_bytes(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    (folder / IN_PROGRESS).unlink(missing_ok=True)
    return manifest


def _note_path(folder: Path, name: str) -> Path:
    return folder / TASKS / f"{Path(name).stem}.json"
