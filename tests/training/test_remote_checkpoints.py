"""Checkpoint folders in a store where nothing can be renamed: an upload without its manifest is none."""

from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ldm.training.checkpoint_files import MANIFEST, StorageError, is_valid, write
from ldm.training.checkpoint_folders import SET_ASIDE, check_writable, find, newest_valid, prune, set_aside, sweep
from ldm.training.checkpoint_io import AtomicCheckpointIO

STORE = "memory://bucket/run"


@pytest.fixture(autouse=True)
def store() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def save(step: int) -> str:
    place = f"{STORE}/step={step:09d}.ckpt"
    write(place, {"state.pt": lambda file: file.write(b"content")}, facts={"step": step})
    return place


def test_an_upload_that_is_cut_off_is_no_checkpoint_and_is_swept(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, opened = save(1), MemoryFileSystem.open

    def cut(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        if path.endswith(MANIFEST):
            raise OSError("connection reset")
        return opened(self, path, *args, **kwargs)

    with monkeypatch.context() as broken, pytest.raises(OSError, match="connection reset"):
        broken.setattr(MemoryFileSystem, "open", cut)
        save(2)
    store.pipe_file("/bucket/run/step=000000003.ckpt/state.pt", b"half")
    assert find(STORE) == [f"memory:///bucket/run/{kept.rpartition('/')[2]}"]
    assert "step=000000003.ckpt" in sweep(STORE)
    assert store.ls("/bucket/run", detail=False) == ["/bucket/run/step=000000001.ckpt"]


def test_a_part_that_no_manifest_names_is_swept_and_the_checkpoint_stays(store: Any) -> None:
    place = save(1)
    store.pipe_file("/bucket/run/step=000000001.ckpt/state.2.pt", b"left over")
    assert sweep(STORE) == ["step=000000001.ckpt/state.2.pt"]
    assert is_valid(place)


def test_a_damaged_one_is_set_aside_once_and_neither_found_nor_swept(store: Any) -> None:
    save(1)
    save(2)
    store.pipe_file("/bucket/run/step=000000002.ckpt/state.pt", b"cOntent")
    told: list[str] = []
    newest = newest_valid(STORE, on_damaged=lambda place, reason: told.append(set_aside(place)))
    assert str(newest).endswith("step=000000001.ckpt")
    assert told == [f"step=000000002.ckpt/{SET_ASIDE}"]
    assert sweep(STORE) == []
    assert store.isfile("/bucket/run/step=000000002.ckpt/state.pt")
    assert len(find(STORE)) == 1


def test_only_the_newest_stay_and_two_valid_ones_always(store: Any) -> None:
    for step in range(1, 6):
        save(step)
    store.pipe_file("/bucket/run/step=000000005.ckpt/state.pt", b"cOntent")
    prune(STORE, keep=1)
    assert [str(place)[-6:-5] for place in find(STORE)] == ["5", "4", "3"]


def test_a_store_that_refuses_is_found_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(STORE)
    assert find(STORE) == []

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("403 Forbidden")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    with pytest.raises(StorageError, match=r"got PermissionError: 403 Forbidden, expected .* see to its credentials"):
        check_writable(STORE)


class HttpError(Exception):
    """What stores raise that know no `OSError`."""


@pytest.mark.parametrize("failures", [1, 2])
def test_an_upload_that_fails_is_tried_again_and_then_said_in_one_line(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, opened = [None] * failures, MemoryFileSystem.open

    def refuse(self: Any, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "wb" and left:
            left.pop()
            raise HttpError("503\nslow down")
        return opened(self, path, mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "open", refuse)
    io, place = AtomicCheckpointIO(attempts=2, wait_seconds=0), f"{STORE}/step=000000001.ckpt"
    with pytest.warns(UserWarning, match="HttpError: 503 slow down; trying again"):
        if failures == 1:
            io.save_checkpoint({"global_step": 1}, place)
        else:
            with pytest.raises(StorageError, match=r"could not be saved to .* \(HttpError: 503 slow down; it needs 0"):
                io.save_checkpoint({"global_step": 1}, place)
    assert len(find(STORE)) == 2 - failures
