"""`ldm data index | validate | filter | report`, as they are typed, and training on what they write."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ldm.cli.main import main, split_command
from ldm.data import Record, ShardDataset, write_shards


@pytest.fixture
def shards(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 16, 3), dtype=np.uint8)
    records = (
        Record(image, f"noise, {i}", {"number": i, "AESTHETIC_SCORE": 4 + i / 2, "punsafe": None if i == 8 else 0.0})
        for i, image in enumerate(pixels)
    )
    write_shards(folder / "set", records, samples_per_shard=4)
    return folder / "set"


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `ldm data`, which is to fail with a code, and gives its one line."""

    def run(code: int, *words: str) -> str:
        assert main(["data", *words]) == code
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0].removeprefix("error: ")

    return run


def test_index_writes_indices_and_says_what_there_is(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "index", "shards=set"]) == 0
    assert "3 shards: 9 samples" in capsys.readouterr().out
    assert len(list(shards.glob("*.index.safetensors"))) == 3
    assert json.loads((shards / "shards.json").read_text())["num_samples"] == 9


def test_index_fails_where_a_shard_cannot_be_read(shards: Path, fails: Callable[..., str]) -> None:
    (shards / "00001.tar").write_bytes(b"<html>")
    assert fails(1, "index", "shards=set", "sha256=false") == "shards that cannot be read: set/00001.tar"
    (shards / "00000.tar").write_bytes((shards / "00000.tar").read_bytes()[:5000])
    cut_off = "shards that are cut off, and read up to there: set/00000.tar"
    assert fails(1, "index", "shards=set", "sha256=false").endswith(f"00001.tar; {cut_off}")


def test_validate_is_silent_on_good_shards_and_fails_on_faults(
    shards: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "validate", "shards=set"]) == 0
    assert "3 shards, 9 samples, 0 faults" in capsys.readouterr().out
    content = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(content.replace(b"IDAT", b"IXXT").replace(b"noise, 5", b"noise, \xff"))
    assert main(["data", "validate", "shards=set/00001.tar", "out=faults.json", "show=1"]) == 1
    printed = capsys.readouterr()
    assert "error: 6 faults: broken_image, not_utf8" in printed.err
    assert "set/00001.tar: 000010000: broken_image: " in printed.out
    assert "... and 5 more" in printed.out
    assert "broken_image             4  skipped" in printed.out
    told = json.loads((folder / "faults.json").read_text())
    assert told["counts"] == {"broken_image": 4, "not_utf8": 2}
    assert [fault["key"] for fault in told["faults"]] == [f"00001000{i}" for i in (0, 1, 1, 1, 2, 3)]
    assert main(["data", "validate", "shards=set/00001.tar", "accept=[broken_image,not_utf8]"]) == 0
    assert main(["data", "validate", "shards=set/00001.tar", "accept=[broken_image]", "decode=false"]) == 1


def test_filter_writes_what_training_reads(shards: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = 'aesthetic >= 5 and not (number in [4, 5] or caption == "noise, 6")'
    assert main(["data", "filter", "shards=set", "out=kept", f"filter.where={where}"]) == 0
    printed = capsys.readouterr().out
    assert "4 of 9 samples kept" in printed
    assert "train on them with data.filter=kept" in printed
    dataset = ShardDataset(shards, resolution=8, columns=["number"], kept=folder / "kept")
    assert [dataset[i, i, 0]["number"] for i in range(len(dataset))] == [2, 3, 7, 8]


def test_filter_takes_presets_lists_braces_and_writes_shards(
    shards: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["filter=laion_aesthetics_v2_4_5", "write=shards", "out=new"]
    assert main(["data", "filter", "shards=set/{00000..00001}.tar", *chosen]) == 0
    assert "7 of 8 samples kept" in capsys.readouterr().out
    assert len(ShardDataset(folder / "new", resolution=8)) == 7
    told = json.loads((folder / "new" / "filter.json").read_text())["filter"]
    assert told["where"] == ["aesthetic >= 4.5"]
    assert told["source"] == "https://laion.ai/blog/laion-aesthetics/"
    several = ['filter.where=["number > 1", "punsafe < 0.1"]', "filter.nulls=drop", "out=kept"]
    assert main(["data", "filter", "shards=[set/00000.tar,set/00002.tar]", *several]) == 0
    printed = capsys.readouterr().out
    assert "2 of 5 samples kept" in printed
    assert "punsafe < 0.1" in printed


def test_report_writes_a_page(shards: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = ["+filter@filters.mine=custom", "filters.mine.where=number < 3"]
    assert main(["data", "report", "shards=set", "out=seen", "pictures=4", *mine]) == 0
    assert "report: seen/index.html" in capsys.readouterr().out
    told = json.loads((folder / "seen" / "report.json").read_text())
    assert told["filters"]["mine"]["kept"] == 3
    assert told["filters"]["laion_aesthetics_v2_4_5"]["kept"] == 8
    assert "pwatermark: there is no such column" in told["filters"]["laion_art"]["refused"]
    assert told["num_images_decoded"] == 4
    assert "<svg" in (folder / "seen" / "index.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["index"], "shards: got none; write shards=FOLDER"),
        (["index", "shards=nowhere"], "shards: got nowhere, where there is no tar file"),
        (["filter", "shards=set", "filter.where=number > 1"], "out: got none; write out=FOLDER"),
        (["filter", "shards=set", "out=kept"], "filter.where has no value; set it with filter.where=..."),
        (["filter", "shards=set", "out=kept", "filter.where=number = 1"], "filter: condition: got '= 1' in "),
        (["filter", "shards=set", "out=kept", "filter.where=nmuber > 1"], "set/00000.tar: 000000000: nmuber: "),
        (["filter", "shards=set", "out=kept", "filter.where=punsafe < 1"], "set/00002.tar: 000020000: got {'"),
        (["filter", "shards=set", "out=kept", "filter.where=caption < 1"], "set/00000.tar: 000000000: caption: got "),
        (["filter", "shards=set", "filter=laion_arts"], "filter=laion_arts: there is no such option; did you"),
        (["filter", "shards=set", "out=set", "filter.where=number > 1"], "out: got set, where the shards are"),
        (["validate", "shards=set", "accept=[exif]"], "accept: got exif, expected kinds such as "),
        (["validate", "shards=set", "decode=maybe"], "decode: got 'maybe', expected true or false"),
        (["report", "shards=set", "row=3"], "row: there is no such setting; did you mean rows? `ldm data report"),
        (["indx", "shards=set"], "data indx: there is no such command; did you mean data index? Commands: "),
        ([], "data: there is no such command; Commands: data index, data validate, data filter, data report"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(words: list[str], message: str, shards: Path, fails: Callable[..., str]) -> None:
    assert fails(2, *words).startswith(message)


def test_help_is_there_for_all_and_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--help"]) == 0
    assert "data index" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["data", "filter", "--help"])
    assert stop.value.code == 0
    assert "laion_improved_aesthetics" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["data", "index", "shards=x"], "data index"),
        (["data", "shards=x"], "data"),
        (["data", "--help"], "data"),
        (["train", "debug=fast"], "train"),
        (["train", "fast"], "train"),
    ],
)
def test_a_command_of_two_words_is_told_from_a_setting(words: list[str], command: str) -> None:
    found, rest = split_command(words)
    assert found == command
    assert [*command.split(), *rest] == words
