"""`ldm shard` as a user types it: each source, every option, a kill, a full disk."""

import errno
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cli_helpers import environment, only, read_json
from PIL import Image

from ldm.cli.compose import conf_folder
from ldm.data.folder import write_folder
from ldm.data.making.make import make_shards

Run = Callable[..., int]


def write_photos(folder: Path, count: int, *, side: int = 16) -> None:
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"caption {i}")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("option", "function"), [("source", make_shards), ("folder", write_folder)])
def test_every_option_of_the_writers_is_one_of_the_command_line(option: str, function: Callable[..., Any]) -> None:
    settings = yaml.safe_load((conf_folder() / "dataset" / f"{option}.yaml").read_text())
    parameters = inspect.signature(function).parameters
    assert set(settings) == {"_target_", *parameters} - {"folder", "progress"}
    for name, parameter in parameters.items():
        if name in settings and parameter.default is not inspect.Parameter.empty:
            assert settings[name] == parameter.default, name


def test_a_table_with_every_option_and_a_table_of_what_was_dropped(
    ldm: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photos(folder / "photos", 6)
    Image.new("RGB", (30, 7)).save(folder / "photos" / "small.png")
    (folder / "photos" / "copy.png").write_bytes((folder / "photos" / "000.png").read_bytes())
    names = [*(f"photos/{i:03d}.png" for i in range(6)), "photos/small.png", "photos/copy.png", "photos/gone.png"]
    lines = [f"{name},words {i},{i / 4}" for i, name in enumerate(names)]
    (folder / "rows.csv").write_text("\n".join(["FILE,Alt,score", *lines]))
    source = ["table=rows.csv", "path_column=file", "caption_columns=alt", "columns=[score]"]
    options = ["resolution=8", "resize_filter=lanczos", "enlarge=true", "crop=centre", "reencode=needed"]
    options += ["image_format=webp", "quality=80", "min_size=8", "captions=optional", "duplicates=perceptual"]
    options += ["duplicate_distance=1", "faults=drop", "samples_per_shard=4", "workers=1"]
    overrides = [*(f"dataset.source.{each}" for each in source), *(f"dataset.{each}" for each in options)]
    assert ldm("shard", "dataset=table", *overrides) == 0
    printed = capsys.readouterr().out
    assert "6 of 9 pictures written\n" in printed
    assert "  tiny_image                 1   11.1%  the short side is below min_size\n" in printed
    assert " such as photos/copy.png: like 000000000\n" in printed
    run = only(folder, "runs/table/*")
    summary = read_json(run / "result.json")["summary"]
    assert (summary["train"], summary["dropped"]) == (6, {"duplicate": 1, "no_image": 1, "tiny_image": 1})
    manifest = read_json(run / "train" / "manifest.json")
    assert [shard["num_samples"] for shard in manifest["shards"]] == [4, 2]
    assert manifest["columns"] == [
        *("crop_left", "crop_top", "score", "source_key", "target_height", "target_width"),
    ]


def test_what_img2dataset_wrote_and_a_data_set_of_hugging_face(ldm: Run, folder: Path) -> None:
    import datasets

    write_photos(folder / "fetched", 0)
    write_photos(folder / "fetched" / "00000", 2)
    for i in range(2):
        (folder / "fetched" / "00000" / f"{i:03d}.json").write_text(json.dumps({"AESTHETIC_SCORE": 5.0 + i}))
    (folder / "fetched" / "00000_stats.json").write_text("{}")
    options = ["dataset.source.folder=fetched", "dataset.source.columns=[aesthetic]"]
    assert ldm("shard", "dataset=img2dataset", *options) == 0
    assert read_json(only(folder, "runs/img2dataset/*") / "result.json")["summary"]["train"] == 2
    rows = {"image": [str(folder / "fetched" / "00000" / "000.png")], "text": ["words"]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk("saved")
    options = ["dataset.source.folder=saved", "dataset.source.caption_columns=text"]
    assert ldm("shard", "dataset=huggingface", *options) == 0
    assert read_json(only(folder, "runs/huggingface/*") / "result.json")["summary"]["train"] == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset=img2dataset"], "dataset.source.folder has no value; set it with dataset.source.folder=..."),
        (
            ["dataset=img2dataset", "dataset.source.folder=photos"],
            "dataset: folder: got photos with shards=*, expected",
        ),
        (
            ["dataset=folder", "dataset.images=photos", "dataset.crop=left"],
            "dataset: crop: got 'left', expected one of",
        ),
        (["dataset=folder", "dataset.images=photos", "dataset.cropp=none"], "did you mean dataset.crop?"),
        (["dataset=source", "dataset.source.folder=photos"], "dataset.source"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_folder(
    ldm: Run, folder: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    write_photos(folder / "photos", 1)
    assert ldm("shard", *overrides) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert list(folder.glob("runs/*")) == []


def test_a_full_disk_is_said_and_loses_nothing(
    ldm: Run, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(folder / "photos", 4)
    command = [
        "shard",
        "dataset=folder",
        "dataset.images=photos",
        "dataset.resolution=8",
        "dataset.samples_per_shard=2",
    ]
    sync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert ldm(*command) == 4
    assert "No space left on device; make room, and the same command goes on" in capsys.readouterr().err
    train = only(folder, "runs/folder/*") / "train"
    first = (train / "00000.tar").stat().st_mtime_ns
    assert ldm(*command) == 0
    assert (train / "00000.tar").stat().st_mtime_ns == first
    assert read_json(train / "manifest.json")["num_samples"] == 4


@pytest.mark.slow
def test_kill_9_leaves_no_process_and_the_same_command_goes_on_with_other_workers(ldm: Run, folder: Path) -> None:
    write_photos(folder / "photos", 60, side=160)
    command = [
        "shard",
        "dataset=folder",
        "dataset.images=photos",
        "dataset.resolution=96",
        "dataset.samples_per_shard=4",
    ]
    words = [sys.executable, "-m", "ldm.cli.main", *command, "dataset.workers=2"]
    started = subprocess.Popen(words, cwd=folder, env=environment(), start_new_session=True)
    until(lambda: list(folder.glob("runs/folder/*/train/0000[2-9].tar")))
    children = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _session(path) == started.pid]
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert len(children) >= 3
    until(lambda: all(_session(Path(f"/proc/{child}/stat")) != started.pid for child in children))
    train = only(folder, "runs/folder/*") / "train"
    assert not (train / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in train.glob("*.tar")}
    assert ldm(*command) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert ldm(*command, "run_id=whole") == 0
    assert contents(train) == contents(folder / "runs" / "folder" / "whole" / "train")


def until(holds: Callable[[], Any]) -> None:
    """Wait until something holds, at most a minute."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _session(stat: Path) -> int:
    """The session of a living process, or 0."""
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(fields[3]) if fields[0] != "Z" else 0


def test_stopped_by_a_user_it_says_that_it_goes_on(
    ldm: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photos(folder / "photos", 1)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm.data.folder.make_shards", interrupt)
    assert ldm("shard", "dataset=folder", "dataset.images=photos") == 130
    assert capsys.readouterr().out.splitlines()[-1] == "stopped; the same command goes on from here"
