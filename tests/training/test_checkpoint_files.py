"""The checkpoint protocol on folders: what is valid, what is found, what may go."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from ldm.training.checkpoint_files import (
    MANIFEST,
    Damaged,
    Manifest,
    StorageError,
    is_valid,
    put_in_place,
    quarantine,
    read_manifest,
    seal,
    verify,
    write,
)
from ldm.training.checkpoint_folders import (
    check_space,
    check_writable,
    child,
    find,
    newest_valid,
    parent,
    prune,
    remove,
    sweep,
)


def save(place: Path | str, step: int = 1, *, content: bytes = b"content") -> Path | str:
    parts = {"state.pt": lambda file: file.write(content), "config.json": lambda file: file.write(b"{}")}
    write(place, parts, facts={"step": step, "saved": time.time()})
    return place


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def content(place: Path) -> bytes:
    return (place / read_manifest(place).files["state.pt"]["file"]).read_bytes()


@pytest.fixture
def store() -> Iterator[str]:
    """A remote store: fsspec's, in memory."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield "memory://bucket/run"
    fs.store.clear()


def test_a_checkpoint_is_a_folder_of_its_parts_and_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "new" / "step=1.ckpt"
    save(path)
    assert names(tmp_path) == [f"new/step=1.ckpt/{name}" for name in ("config.json", MANIFEST, "state.pt")]
    assert read_manifest(path).facts["step"] == 1
    assert read_manifest(path).num_bytes == len(b"content") + len(b"{}")


def test_every_flipped_bit_of_every_file_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "step=1.ckpt"
    save(path)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for place in range(len(whole)):
            changed = bytearray(whole)
            changed[place] ^= 1 << (place % 8)
            file.write_bytes(changed)
            assert not is_valid(path), (file.name, place)
        file.write_bytes(whole)
    verify(path)


@pytest.mark.parametrize("name", [MANIFEST, "state.pt"])
def test_every_truncation_is_seen(name: str, tmp_path: Path) -> None:
    path = tmp_path / "step=1.ckpt"
    save(path)
    whole = (path / name).read_bytes()
    for length in range(len(whole)):
        (path / name).write_bytes(whole[:length])
        assert not is_valid(path), length


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    path = tmp_path / "step=1.ckpt"
    save(path)
    (path / "state.pt").write_bytes(b"cont")
    with pytest.raises(Damaged, match=r"state.pt has 4 bytes, not 7"):
        verify(path)
    (path / "state.pt").unlink()
    with pytest.raises(Damaged, match=r"state.pt is missing"):
        verify(path)
    (path / MANIFEST).unlink()
    with pytest.raises(Damaged, match="it has no manifest"):
        verify(path)


def test_a_manifest_cannot_name_files_outside_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"content")
    path = tmp_path / "step=1.ckpt"
    save(path)
    record = read_manifest(path).files["state.pt"]
    (path / MANIFEST).write_bytes(Manifest({"state.pt": {**record, "file": "../secret"}}, {}).text())
    with pytest.raises(Damaged, match=r"\.\./secret, a file outside of it"):
        verify(path)


def test_writing_over_a_checkpoint_leaves_the_new_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for step in range(1, 5):
        save(path, step, content=b"%d" % step)
        verify(path)
        assert content(path) == b"%d" % step
        assert len(names(path)) == 3


def test_a_writer_that_fails_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    def fail(file: object) -> None:
        raise OSError("no more")

    path = tmp_path / "last.ckpt"
    save(path, content=b"old")
    before = names(tmp_path)
    for target in (path, tmp_path / "other.ckpt"):
        with pytest.raises(OSError, match="no more"):
            write(target, {"config.json": lambda file: file.write(b"new"), "state.pt": fail}, facts={})
    verify(path)
    assert content(path) == b"old"
    assert names(tmp_path) == before


def test_a_damaged_checkpoint_in_the_way_is_set_aside_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path, content=b"old")
    (path / MANIFEST).write_bytes(b"{}")
    save(path, content=b"new")
    assert content(path) == b"new"
    assert (tmp_path / "last.ckpt.corrupt" / "state.pt").read_bytes() == b"old"


def test_a_file_of_the_former_format_is_replaced_by_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({}, path)
    save(path)
    verify(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_others_filled_is_sealed_and_replaces_the_former_one(tmp_path: Path) -> None:
    path, temporary = tmp_path / "step=1.ckpt", tmp_path / ".step=1.ckpt.0.tmp"
    save(path)
    temporary.mkdir()
    (temporary / "__0_0.distcp").write_bytes(b"shard")
    (temporary / ".metadata").write_bytes(b"where")
    seal(temporary, facts={"step": 7})
    put_in_place(temporary, path)
    verify(path)
    assert names(tmp_path) == [f"step=1.ckpt/{name}" for name in (".metadata", "__0_0.distcp", MANIFEST)]
    (path / ".metadata").write_bytes(b"wherE")
    assert not is_valid(path)


def test_nothing_is_renamed_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def note(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def checked_replace(source: Path, target: Path) -> None:
        assert source.name in flushed
        if target.name == MANIFEST:
            assert target.parent.name in flushed, "the parts' names must be on the disk before the manifest"
        replace(source, target)

    def checked_rename(source: Path, target: Path) -> None:
        assert flushed[-1] == source.name
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "replace", checked_replace)
    monkeypatch.setattr(Path, "rename", checked_rename)
    save(tmp_path / "step=1.ckpt")
    assert flushed[-1] == tmp_path.name
    save(tmp_path / "step=1.ckpt")
    assert flushed[-1] == "step=1.ckpt"


def test_the_newest_is_the_one_of_the_most_steps_whatever_the_clock_says(tmp_path: Path) -> None:
    for step in (90, 200, 100):
        save(tmp_path / f"step={step}.ckpt", step)
    save(tmp_path / "last.ckpt", 150)
    torch.save({}, tmp_path / "step=120.ckpt")
    found = [Path(place).name for place in find(tmp_path)]
    assert found == ["step=200.ckpt", "last.ckpt", "step=120.ckpt", "step=100.ckpt", "step=90.ckpt"]


def test_the_newest_valid_one_is_found_behind_damaged_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path / f"step={step}.ckpt", step)
    (tmp_path / "step=4.ckpt" / "state.pt").write_bytes(b"Content")
    (tmp_path / "step=3.ckpt" / MANIFEST).unlink()
    damaged: dict[str, str] = {}
    newest = newest_valid(tmp_path, on_damaged=lambda place, reason: damaged.update({Path(place).name: reason}))
    assert newest == tmp_path / "step=2.ckpt"
    assert damaged == {"step=4.ckpt": "state.pt is not as it was written", "step=3.ckpt": "it has no manifest"}
    assert newest_valid(tmp_path / "nowhere") is None


def test_a_file_of_the_former_format_is_valid_by_its_own_checksums(tmp_path: Path) -> None:
    path = tmp_path / "step=1.ckpt"
    weights = torch.randn(1000)
    torch.save({"w": weights}, path)
    verify(path)
    whole = path.read_bytes()
    start = whole.index(weights.numpy().tobytes())
    for place in range(start, start + 4000, 300):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not is_valid(path)


def test_quarantined_checkpoints_are_kept_apart(tmp_path: Path) -> None:
    for content_ in (b"first", b"second"):
        save(tmp_path / "step=1.ckpt", content=content_)
        quarantine(tmp_path / "step=1.ckpt")
    assert find(tmp_path) == []
    kept = {path.name: (path / "state.pt").read_bytes() for path in tmp_path.iterdir()}
    assert kept == {"step=1.ckpt.corrupt": b"first", "step=1.ckpt.corrupt-2": b"second"}


def test_the_last_two_valid_ones_are_never_removed(tmp_path: Path) -> None:
    places = [save(tmp_path / f"step={step}.ckpt", step) for step in (1, 2, 3, 4)]
    assert [remove(place) for place in places] == [True, True, False, False]
    assert find(tmp_path) == [tmp_path / "step=4.ckpt", tmp_path / "step=3.ckpt"]


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_damaged_ones_do_not_count_as_kept(keep: int, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path / f"step={step}.ckpt", step)
    for step in (3, 4):
        (tmp_path / f"step={step}.ckpt" / "state.pt").write_bytes(b"damaged")
    prune(tmp_path, keep=keep)
    assert [is_valid(tmp_path / f"step={step}.ckpt") for step in (1, 2)] == [True, True]


def test_sweeping_removes_leftovers_and_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "step=1.ckpt")
    (tmp_path / ".step=2.ckpt.77.123.tmp").mkdir()
    (tmp_path / ".step=2.ckpt.77.123.tmp" / "state.pt").write_bytes(b"half")
    (tmp_path / ".step=3.ckpt.77.tmp").write_bytes(b"half, in the former format")
    (tmp_path / "step=1.ckpt" / ".state.2.pt.77.tmp").write_bytes(b"half")
    (tmp_path / "step=1.ckpt" / "weights.2.safetensors").write_bytes(b"whole, but never committed")
    (tmp_path / "foreign.ckpt").mkdir()
    (tmp_path / "foreign.ckpt" / "precious").write_bytes(b"not ours")
    assert len(sweep(tmp_path)) == 4
    kept = ["config.json", MANIFEST, "state.pt"]
    assert names(tmp_path) == ["foreign.ckpt/precious", *(f"step=1.ckpt/{name}" for name in kept)]


def test_no_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"step=1.ckpt: got .* of free disk space, expected 1e\+06 GB; make room"):
        check_space(tmp_path / "new" / "step=1.ckpt", 10**15)
    check_space(tmp_path / "new" / "step=1.ckpt", 10)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="expected a folder that checkpoints can be written to"):
        check_writable(tmp_path / "file")


def test_a_remote_store_holds_checkpoints_whose_manifest_came_last(store: str) -> None:
    fs = fsspec.filesystem("memory")
    first, second = (save(child(store, f"step={step}.ckpt"), step) for step in (1, 2))
    assert [str(place).rpartition("/")[2] for place in find(store)] == ["step=2.ckpt", "step=1.ckpt"]
    verify(second)
    save(second, 2, content=b"again")
    verify(second)
    assert len(fs.find("/bucket/run/step=2.ckpt")) == 3
    fs.rm_file(f"/bucket/run/step=2.ckpt/{MANIFEST}")
    assert newest_valid(store) == find(store)[0]
    assert str(newest_valid(store)).endswith("step=1.ckpt")
    assert parent(str(first)) == store


def test_an_upload_that_breaks_off_leaves_the_old_checkpoint(store: str) -> None:
    def fail(file: object) -> None:
        raise OSError("connection lost")

    place = save(child(store, "last.ckpt"), content=b"old")
    with pytest.raises(OSError, match="connection lost"):
        write(place, {"config.json": lambda file: file.write(b"new"), "state.pt": fail}, facts={})
    verify(place)
    assert fsspec.filesystem("memory").cat_file("/bucket/run/last.ckpt/state.pt") == b"old"
    assert len(fsspec.filesystem("memory").find("/bucket/run/last.ckpt")) == 3


def test_two_valid_ones_stay_in_a_remote_store_too(store: str) -> None:
    places = [save(child(store, f"step={step}.ckpt"), step) for step in (1, 2, 3)]
    assert [remove(place) for place in places] == [True, False, False]
    assert len(find(store)) == 2


def test_a_file_address_is_the_path_it_names(tmp_path: Path) -> None:
    save(f"file://{tmp_path}/step=1.ckpt")
    assert find(f"file://{tmp_path}") == [tmp_path / "step=1.ckpt"]
    assert json.loads((tmp_path / "step=1.ckpt" / MANIFEST).read_text())["facts"]["step"] == 1
