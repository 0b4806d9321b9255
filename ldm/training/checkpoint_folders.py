"""Folders of checkpoints: which one is the newest valid one, what may be removed, whether there is room for another."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ldm.training.checkpoint_files import (
    MANIFEST,
    Damaged,
    Place,
    StorageError,
    delete,
    drop_unlisted,
    is_valid,
    local_path,
    manifest_or_none,
    quarantine,
    temporary_beside,
    url_to_fs,
    verify,
)

# So many valid checkpoints stay, whatever is removed.
SPARE = 2
# The manifest of a damaged checkpoint in a remote store.
SET_ASIDE = "manifest.corrupt.json"


def find(folder: Place) -> list[Place]:
    """Everything named `*.ckpt` in a folder, valid or not, the newest first; in remote stores what has a manifest."""
    fs, root = url_to_fs(str(folder))
    if not fs.isdir(root):
        return []
    names = [name.rstrip("/") for name in fs.ls(root, detail=False, refresh=True) if name.rstrip("/").endswith(".ckpt")]
    if local_path(folder) is not None:
        places: list[Place] = [Path(name) for name in names if not Path(name).name.startswith(".")]
    else:
        places = [fs.unstrip_protocol(name) for name in names if fs.isfile(f"{name}/{MANIFEST}") or fs.isfile(name)]
    return sorted(places, key=_age, reverse=True)


def newest_valid(folder: Place, *, on_damaged: Callable[[Place, str], None] | None = None) -> Place | None:
    """The newest valid checkpoint of a folder; damaged ones on the way are handed to `on_damaged` with the reason."""
    for place in find(folder):
        try:
            verify(place)
        except Damaged as damage:
            if on_damaged is not None:
                on_damaged(place, str(damage))
        else:
            return place
    return None


def remove(place: Place, *, spare: int = SPARE, valid: Callable[[Place], bool] = is_valid) -> bool:
    """Removes a checkpoint if `spare` other valid ones lie beside it; returns whether it is gone."""
    fs, root = url_to_fs(str(place))
    if not fs.exists(root):
        return True
    left = spare
    for other in find(parent(place)):
        if left and url_to_fs(str(other))[1] != root and valid(other):
            left -= 1
    if left:
        return False
    path = local_path(place)
    if path is None:
        if fs.isfile(f"{root}/{MANIFEST}"):
            fs.rm_file(f"{root}/{MANIFEST}")
        fs.rm(root, recursive=True)
        return True
    # Renamed first: what a kill leaves of it is a temporary, not a damaged checkpoint.
    doomed = temporary_beside(path)
    path.rename(doomed)
    delete(doomed)
    return True


def prune(folder: Place, *, keep: int, valid: Callable[[Place], bool] = is_valid) -> list[Place]:
    """Removes all but the newest `keep` checkpoints, never the last two valid ones; returns what it removed."""
    return [place for place in reversed(find(folder)[keep:]) if remove(place, valid=valid)]


def set_aside(place: Place) -> str:
    """Keeps a damaged checkpoint where `find` does not; returns its new name.

    Nothing can be renamed in a remote store: there its manifest, the mark of a checkpoint, gets another name.
    """
    path = local_path(place)
    if path is not None:
        return quarantine(path).name
    fs, root = url_to_fs(str(place))
    if fs.isfile(root):
        fs.mv(root, f"{root}.corrupt")
        return f"{root.rpartition('/')[2]}.corrupt"
    fs.pipe_file(f"{root}/{SET_ASIDE}", fs.cat_file(f"{root}/{MANIFEST}"))
    fs.rm_file(f"{root}/{MANIFEST}")
    return f"{root.rpartition('/')[2]}/{SET_ASIDE}"


def sweep(folder: Place) -> list[str]:
    """Removes what killed processes left half done in a folder that nobody writes to; returns the names."""
    path = local_path(folder)
    if path is None:
        return _sweep_remote(folder)
    if not path.is_dir():
        return []
    stale = [entry for entry in path.iterdir() if entry.name.startswith(".") and entry.name.endswith(".tmp")]
    for entry in stale:
        delete(entry)
    for checkpoint in path.glob("*.ckpt"):
        manifest = manifest_or_none(checkpoint)
        if manifest is not None:
            stale += [checkpoint / name for name in drop_unlisted(checkpoint, manifest)]
    return [entry.relative_to(path).as_posix() for entry in stale]


def _sweep_remote(folder: Place) -> list[str]:
    """Removes uploads whose manifest never came, and files that no manifest names."""
    fs, root = url_to_fs(str(folder))
    if not fs.isdir(root):
        return []
    stale = []
    for name in (found.rstrip("/") for found in fs.ls(root, detail=False, refresh=True)):
        if not name.endswith(".ckpt") or not fs.isdir(name) or fs.isfile(f"{name}/{SET_ASIDE}"):
            continue
        place, short = fs.unstrip_protocol(name), name.rpartition("/")[2]
        if fs.isfile(f"{name}/{MANIFEST}"):
            manifest = manifest_or_none(place)
            stale += [f"{short}/{lost}" for lost in drop_unlisted(place, manifest)] if manifest else []
        else:
            fs.rm(name, recursive=True)
            stale.append(short)
    return stale


def check_space(place: Place, needed: int) -> None:
    """Refuses to begin what the disk cannot hold.

    Raises:
        StorageError: fewer than `needed` bytes are free where `place` is to lie.
    """
    path = local_path(place)
    if path is None:
        return
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise StorageError(
            f"{place}: got {in_words(free)} of free disk space, expected {in_words(needed)}; make room, or choose "
            "another disk with callback.checkpoint.folder. Earlier checkpoints are as they were"
        )


def check_writable(folder: Place) -> None:
    """Makes the folder and writes a byte into it.

    Raises:
        StorageError: one of the two failed.
    """
    path = local_path(folder)
    if path is None:
        _check_remote(folder)
        return
    probe = path / f".probe.{os.getpid()}.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"{folder}: got {error.strerror or error}, expected a folder that checkpoints can be written to; set "
            "callback.checkpoint.folder"
        ) from error


def _check_remote(folder: Place) -> None:
    fs, root = url_to_fs(str(folder))
    probe = f"{root}/.probe.{os.getpid()}.tmp"
    try:
        fs.pipe_file(probe, b"0")
        fs.rm_file(probe)
    except Exception as error:  # each store has errors of its own
        raise StorageError(
            f"{folder}: got {type(error).__name__}: {' '.join(str(error).split())}, expected a place that checkpoints "
            "can be uploaded to; see to its credentials, or set callback.checkpoint.folder"
        ) from error


def parent(place: Place) -> Place:
    """The folder around a checkpoint."""
    path = local_path(place)
    return str(place).rstrip("/").rpartition("/")[0] if path is None else path.parent


def child(folder: Place, name: str) -> Place:
    """A checkpoint's place in a folder."""
    path = local_path(folder)
    return f"{str(folder).rstrip('/')}/{name}" if path is None else path / name


def in_words(num_bytes: int) -> str:
    """1.5 GB, 20 MB, 3 kB."""
    for unit, size in {"GB": 1e9, "MB": 1e6, "kB": 1e3}.items():
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"


def _age(place: Place) -> tuple[int, float]:
    """Orders checkpoints by step, and by time within a step; a clock that jumps moves none past another."""
    root = url_to_fs(str(place))[1]
    manifest = manifest_or_none(place)
    if manifest is not None and "step" in manifest.facts:
        return manifest.facts["step"], manifest.facts.get("saved", 0.0)
    named = re.search(r"step=(\d+)", root.rpartition("/")[2])
    modified = Path(root).stat().st_mtime if local_path(place) is not None and Path(root).exists() else 0.0
    return (int(named[1]) if named else -1, modified)


def is_checkpoint(place: Place) -> bool:
    """Whether a place claims to be a checkpoint: a file, a folder with a manifest, or one named `.ckpt`."""
    fs, root = url_to_fs(str(place))
    return fs.isfile(root) or fs.isfile(f"{root}/{MANIFEST}") or (root.endswith(".ckpt") and fs.isdir(root))
