"""Shards are a function of source and options alone: not of workers, and not of having been killed."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from picture_sources import contents, dropped, encoded, picture, samples, write_pictures

from ldm.data.folder import Folder
from ldm.data.making import journal
from ldm.data.making.make import make_shards
from ldm.data.writer import ShardFile, read_manifest


@pytest.fixture
def mixed(tmp_path: Path) -> Folder:
    """Eleven pictures: one broken, two without a caption, one that is there twice."""
    folder = write_pictures(tmp_path / "in", 11)
    (folder / "003.jpg").write_bytes(b"<html>")
    (folder / "004.txt").unlink()
    (folder / "010.txt").unlink()
    (folder / "007.jpg").write_bytes((folder / "001.jpg").read_bytes())
    return Folder(folder)


OPTIONS: dict[str, Any] = {"resolution": 8, "samples_per_shard": 3, "duplicates": "sha256"}
LOST = [("003.jpg", "broken_image"), ("004.jpg", "missing_caption"), ("007.jpg", "duplicate")]
LOST += [("010.jpg", "missing_caption")]


def test_what_is_dropped_is_counted_and_listed_by_reason(mixed: Folder, tmp_path: Path) -> None:
    summary = make_shards(tmp_path / "out", source=mixed, **OPTIONS)
    assert summary["train"] == 7
    assert summary["dropped"] == {"missing_caption": 2, "broken_image": 1, "duplicate": 1}
    assert summary["examples"]["duplicate"] == "007.jpg: like 000000001"
    assert dropped(tmp_path / "out" / "train") == LOST
    manifest = read_manifest(tmp_path / "out" / "train")
    assert [shard["num_samples"] for shard in manifest["shards"]] == [3, 3, 1]
    assert manifest["dropped"] == summary["dropped"]
    assert [row["source_key"] for row in samples(tmp_path / "out" / "train")] == [
        f"{i:03d}.jpg" for i in (0, 1, 2, 5, 6, 8, 9)
    ]


def test_no_byte_depends_on_the_number_of_workers(mixed: Folder, tmp_path: Path) -> None:
    for workers in (0, 2):
        make_shards(tmp_path / str(workers), source=mixed, workers=workers, **OPTIONS)
    assert contents(tmp_path / "0" / "train") == contents(tmp_path / "2" / "train")


def test_a_run_killed_at_any_point_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pictures(tmp_path / "in", 5)
    (folder / "000.txt").unlink()
    (folder / "003.jpg").write_bytes((folder / "001.jpg").read_bytes())
    source, options = Folder(folder), {**OPTIONS, "samples_per_shard": 2}

    def write(folder: Path, *, kill_at: int) -> bool:
        """Write in a process that dies, unflushed, at its n-th step that touches a file; say whether it got through."""
        child = os.fork()
        if not child:
            _die_at(kill_at, monkeypatch)
            make_shards(folder, source=source, **options)
            os._exit(0)
        return os.waitpid(child, 0)[1] == 0

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what is written outlives the process without it
    make_shards(tmp_path / "whole", source=source, **options)
    step = 0
    while not write(tmp_path / f"{step}", kill_at=step):
        if step % 4 == 0:
            write(tmp_path / f"{step}", kill_at=7)  # and killed again on the way
        make_shards(tmp_path / f"{step}", source=source, **options)
        assert contents(tmp_path / f"{step}" / "train") == contents(tmp_path / "whole" / "train"), step
        step += 1
    assert step > 20


def _die_at(kill_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the calls that change files, and end the process at one of them, before or after it takes effect."""
    left = [kill_at]

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(Path, "replace", dying(Path.replace))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))
    monkeypatch.setattr(Path, "write_bytes", dying(Path.write_bytes))
    monkeypatch.setattr(ShardFile, "add", dying(ShardFile.add))
    monkeypatch.setattr(journal.Journal, "_sync", staticmethod(dying(journal.Journal._sync)))


def test_going_on_prepares_only_what_is_not_written(mixed: Folder, tmp_path: Path) -> None:
    asked: list[int] = []

    def stop(written: int, lost: int) -> None:
        asked.append(written)
        if written == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shards(tmp_path / "out", source=mixed, progress=stop, **OPTIONS)
    assert read_manifest(tmp_path / "out" / "train") is None
    asked.clear()
    make_shards(tmp_path / "out", source=mixed, progress=lambda written, lost: asked.append(written), **OPTIONS)
    assert asked[0] == 3  # the first shard is there, and what follows it was dropped
    asked.clear()
    make_shards(tmp_path / "out", source=mixed, progress=lambda written, lost: asked.append(written), **OPTIONS)
    assert asked == []


@pytest.mark.parametrize("change", ["option", "file", "torn shard"])
def test_what_no_longer_fits_is_written_anew(mixed: Folder, tmp_path: Path, change: str) -> None:
    def stop(written: int, lost: int) -> None:
        if written == 7:
            raise KeyboardInterrupt

    options = dict(OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        make_shards(tmp_path / "a", source=mixed, progress=stop, **options)
    if change == "option":
        options["resolution"] = 6
    elif change == "file":
        (tmp_path / "in" / "000.jpg").write_bytes(encoded(picture(99)))
    else:
        (tmp_path / "a" / "train" / "00000.tar").write_bytes(b"torn")
    for name in ("a", "b"):
        make_shards(tmp_path / name, source=mixed, **options)
    assert contents(tmp_path / "a" / "train") == contents(tmp_path / "b" / "train")


@pytest.mark.parametrize(("distance", "kept"), [(0, [0, 2]), (4, [0])])
def test_pictures_that_look_alike_are_found_however_they_were_encoded(
    tmp_path: Path, distance: int, kept: list[int]
) -> None:
    (tmp_path / "in").mkdir()
    image = picture(5, (64, 48))
    darker = image.point(lambda value: value * 0.7)
    darker.paste((255, 255, 255), (0, 0, 12, 7))  # changes few bits of the hash
    for i, content in enumerate([encoded(image, quality=95), encoded(image, "PNG"), encoded(darker)]):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(content)
    options = {"duplicates": "perceptual", "duplicate_distance": distance, "captions": "optional"}
    make_shards(tmp_path / "out", source=Folder(tmp_path / "in"), **options)
    assert [row["source_key"] for row in samples(tmp_path / "out" / "train")] == [f"{i}.jpg" for i in kept]


def test_the_first_fault_stops_a_run_that_refuses_faults(mixed: Folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^003.jpg: got a picture that cannot be read; remove or repair it$"):
        make_shards(tmp_path / "out", source=mixed, faults="refuse")


def test_a_set_of_which_nothing_is_left_says_why(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in", 2, captions=False)
    with pytest.raises(
        ValueError, match=r"got nothing to write \(2 missing_caption\).*000.jpg: got .* without 000.txt"
    ):
        make_shards(tmp_path / "out", source=Folder(folder))


def test_a_worker_that_dies_is_said_in_a_line(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in", 2)
    with pytest.raises(ValueError, match="workers: got 1, of which one died"):
        make_shards(tmp_path / "out", source=Deadly(str(folder)), workers=1)


class Deadly(Folder):
    """A source whose items end the process that reads them."""

    def items(self, part: str):
        for item in super().items(part):
            yield type(item)(item.name, image=_Bomb())


class _Bomb(bytes):
    def __reduce__(self) -> tuple:
        return os._exit, (1,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "middle"}, "crop: got 'middle', expected one of none, centre"),
        ({"resolution": 0}, "resolution: got 0"),
        ({"min_size": -1}, "min_size: got -1"),
        ({"image_format": "gif"}, "image_format: got 'gif'"),
        ({"quality": 0}, "quality: got 0, expected 1 to 100"),
        ({"faults": "ignore"}, "faults: got 'ignore'"),
        ({"workers": -1}, "workers: got -1"),
        ({"samples_per_shard": 0}, "samples_per_shard: got 0"),
        ({"duplicate_distance": 3}, "duplicate_distance: got 3 with duplicates=keep, which knows no distance"),
        ({"duplicates": "perceptual", "duplicate_distance": 8}, "duplicate_distance: got 8, expected 0 to 7"),
        ({"reencode": "never", "resolution": 8}, "reencode: got never with resolution=8 and crop=none"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_shards(tmp_path / "out", source=Folder(tmp_path), **options)
    assert not (tmp_path / "out").exists()


def test_the_shards_say_the_sha256_of_what_they_hold(mixed: Folder, tmp_path: Path) -> None:
    make_shards(tmp_path / "out", source=mixed, **OPTIONS)
    train = tmp_path / "out" / "train"
    assert [row["sha256"] for row in samples(train)] == [
        hashlib.sha256(row["bytes"]).hexdigest() for row in samples(train)
    ]
    for shard in json.loads((train / "manifest.json").read_text())["shards"]:
        assert hashlib.sha256((train / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
