"""Folders, tables, data sets of Hugging Face and what img2dataset fetched, as shards."""

import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from picture_sources import dropped, encoded, fetch, picture, samples, write_pictures
from pyarrow import parquet

from ldm.data.folder import Folder, write_folder
from ldm.data.making.dropped import Dropped
from ldm.data.making.huggingface import HuggingFace
from ldm.data.making.img2dataset import Img2dataset
from ldm.data.making.make import make_shards
from ldm.data.making.picture import Preparation, prepare
from ldm.data.making.sources import Item, Source
from ldm.data.making.table import RowView, Table


def made(source: Source, tmp_path: Path, **options: Any) -> list[dict[str, Any]]:
    make_shards(tmp_path / "out", source=source, **{"reencode": "never", **options})
    return samples(tmp_path / "out" / "train")


def test_a_folder_reads_text_or_json_beside_and_folders_inside(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in", 2)
    write_pictures(folder / "more", 1, captions=False)
    (folder / "more" / "000.json").write_text(json.dumps({"text": "of json", "score": 0.5}))
    (folder / "001.json").write_text(json.dumps({"caption": "of text first", "score": 2}))
    rows = made(Folder(folder, pattern="**/*"), tmp_path)
    assert [(row["source_key"], row["caption"], row.get("score")) for row in rows] == [
        ("000.jpg", "caption 0", None),
        ("001.jpg", "caption 1", 2),
        ("more/000.jpg", "of json", 0.5),
    ]


@pytest.mark.parametrize(
    ("beside", "content", "expected"),
    [
        ("000.json", b"{", "broken_json"),
        ("000.json", b"[1]", "broken_json"),
        ("000.json", b'{"caption": "\xff"}', "not_utf8"),
        ("000.txt", b"\xff\xfe", "not_utf8"),
        ("000.txt", b" \n", "missing_caption"),
    ],
)
def test_what_lies_beside_a_picture_may_be_broken(tmp_path: Path, beside: str, content: bytes, expected: str) -> None:
    folder = write_pictures(tmp_path / "in", 2)
    (folder / beside).write_bytes(content)
    assert [row["source_key"] for row in made(Folder(folder), tmp_path)] == ["001.jpg"]
    assert dropped(tmp_path / "out" / "train") == [("000.jpg", expected)]


def test_repeated_pictures_are_no_duplicates_to_drop(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "in", 1)
    with pytest.raises(ValueError, match="duplicates: got sha256 with class_images or several captions"):
        write_folder(tmp_path / "out", images=folder, caption=["a", "b"], duplicates="sha256")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_table_names_pictures_and_keeps_its_columns(tmp_path: Path, suffix: str) -> None:
    write_pictures(tmp_path / "in", 3, captions=False)
    paths = ["000.jpg", str(tmp_path / "in" / "001.jpg"), "gone.jpg"]
    rows = [{"File": path, "TEXT": f"a, {i}", "Score": i / 2, "n": i} for i, path in enumerate(paths)]
    path, mark = tmp_path / "in" / f"rows{suffix}", "\t" if suffix == ".tsv" else ","
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = [mark.join(rows[0]), *(mark.join(f'"{value}"' for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines))
    rows = made(Table(str(path), path_column="file"), tmp_path)
    assert [(row["source_key"], row["caption"], row["Score"], row["n"]) for row in rows] == [
        ("000.jpg", "a, 0", 0.0, 0),
        (paths[1], "a, 1", 0.5, 1),
    ]
    assert dropped(tmp_path / "out" / "train") == [("gone.jpg", "no_image")]


def test_of_several_captions_the_first_that_is_there_is_taken(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", 3, captions=False)
    (tmp_path / "rows.csv").write_text("path,long,short\n000.jpg,a long one,a\n001.jpg,,b\n002.jpg,,\n")
    table = Table(str(tmp_path / "rows.csv"), caption_columns=["long", "short"], root=str(tmp_path / "in"))
    rows = made(table, tmp_path)
    assert [(row["txt"], row["long"], row["short"]) for row in rows] == [
        ("a long one", "a long one", "a"),
        ("b", "", "b"),
    ]
    assert dropped(tmp_path / "out" / "train") == [("002.jpg", "missing_caption")]


def test_a_table_without_captions_and_with_chosen_columns(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", 1, captions=False)
    (tmp_path / "in" / "rows.csv").write_text("path,SCORE,other\n000.jpg,1.5,x\n")
    table = Table(str(tmp_path / "in" / "*.csv"), caption_columns=None, columns=["score"])
    (row,) = made(table, tmp_path, captions="optional")
    assert (row["caption"], row["score"], "other" in row) == ("", 1.5, False)


def test_going_on_in_the_middle_of_a_part_skips_what_is_done(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", 5, captions=False)
    for name, numbers in (("a", (0, 1)), ("b", (2, 3, 4))):
        lines = "".join(f"{i:03d}.jpg,caption {i}\n" for i in numbers)
        (tmp_path / "in" / f"{name}.csv").write_text(f"path,caption\n{lines}")
    source = Table(f"{tmp_path}/in/{{a,b}}.csv")

    def stop(written: int, lost: int) -> None:
        if written == 3:
            raise KeyboardInterrupt

    for progress in (stop, lambda *_: None):
        try:
            make_shards(tmp_path / "out", source=source, samples_per_shard=3, progress=progress)
        except KeyboardInterrupt:
            continue
    assert [row["caption"] for row in samples(tmp_path / "out" / "train")] == [f"caption {i}" for i in range(5)]


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (
            "path,caption\nhttps://a/b.jpg,x\n",
            {},
            "path_column: got the URL https://a/b.jpg.* fetch them with img2dataset",
        ),
        ("file,caption\na.jpg,x\n", {}, r"path_column: got .*rows.csv without it: path: there is no such column"),
        ("path,alt\na.jpg,x\n", {}, "caption_columns: got .* set dataset.source.caption_columns=NAME"),
        ("path,caption\na.jpg,x\n", {"columns": ["score"]}, "columns: got .* without it: score"),
        ("path,caption\na.jpg\n", {}, "table: got .*rows.csv, which cannot be read"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    tmp_path: Path, lines: str, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "rows.csv").write_text(lines)
    with pytest.raises(ValueError, match=message):
        made(Table(str(tmp_path / "rows.csv"), **options), tmp_path)


def test_a_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in ("none.csv", "*.parquet"):
        with pytest.raises(ValueError, match=r"table: got .*, expected files that are there"):
            made(Table(str(tmp_path / name)), tmp_path)


@pytest.fixture
def on_disk(tmp_path: Path) -> datasets.Dataset:
    (tmp_path / "in").mkdir()
    paths = [str(write_pictures(tmp_path / "in", 4, captions=False) / f"{i:03d}.jpg") for i in range(4)]
    rows = {"image": paths, "text": [f"t{i}" for i in range(4)], "label": [0, 1, 1, 0]}
    features = {"image": datasets.Image(), "text": datasets.Value("string")}
    names = datasets.ClassLabel(names=["cat", "dog"])
    return datasets.Dataset.from_dict(rows, features=datasets.Features({**features, "label": names}))


@pytest.mark.parametrize("layout", ["Dataset", "DatasetDict", "parquet", "shards"])
def test_a_data_set_of_hugging_face_is_read_as_it_was_saved(
    on_disk: datasets.Dataset, tmp_path: Path, layout: str
) -> None:
    folder = tmp_path / "set"
    if layout == "Dataset":
        on_disk.save_to_disk(str(folder))
    elif layout == "shards":
        on_disk.save_to_disk(str(folder), num_shards=2)
    elif layout == "DatasetDict":
        parts = {"train": on_disk, "test": on_disk.select([0])}
        datasets.DatasetDict(parts).save_to_disk(str(folder))
    else:
        (folder / "data").mkdir(parents=True)
        datasets.Dataset.to_parquet(on_disk, str(folder / "data" / "train-00000-of-00001.parquet"))
        on_disk.select([0]).to_parquet(str(folder / "data" / "test-00000-of-00001.parquet"))
    rows = made(HuggingFace(str(folder), caption_columns="label"), tmp_path)
    assert [(row["caption"], row["label"], row["text"]) for row in rows] == [
        ("cat", 0, "t0"),
        ("dog", 1, "t1"),
        ("dog", 1, "t2"),
        ("cat", 0, "t3"),
    ]
    assert [row["bytes"] for row in rows] == [encoded(picture(i)) for i in range(4)]


def test_a_split_or_column_that_is_not_there_is_refused(on_disk: datasets.Dataset, tmp_path: Path) -> None:
    datasets.DatasetDict({"train": on_disk}).save_to_disk(str(tmp_path / "set"))
    for options, message in (
        ({"split": "val"}, "split: got val, expected one of train"),
        ({"image_column": "pixels"}, "image_column: got .* set dataset.source.image_column=NAME"),
        ({"image_column": "label"}, "image_column: got label, which holds '[01]', expected paths or pictures"),
        ({"caption_columns": "alt"}, "caption_columns: got .* set dataset.source.caption_columns=NAME"),
    ):
        with pytest.raises(ValueError, match=message):
            made(HuggingFace(str(tmp_path / "set"), **options), tmp_path)
    with pytest.raises(ValueError, match=r"folder: got .*, expected what save_to_disk"):
        made(HuggingFace(str(tmp_path / "in")), tmp_path)


FETCHED: list[dict[str, Any]] = [
    {"jpg": encoded(picture(0)), "caption": "zero", "url": "u0", "AESTHETIC_SCORE": 5.5, "NSFW": "UNLIKELY"},
    {"caption": "one", "url": "u1", "AESTHETIC_SCORE": None, "NSFW": None, "error": "HTTP Error 404: Not Found"},
    {"jpg": encoded(picture(2)), "caption": None, "url": "u2", "AESTHETIC_SCORE": 6.0, "NSFW": None},
    {"jpg": encoded(picture(3)), "caption": "three", "url": "u3", "AESTHETIC_SCORE": 0.0, "NSFW": "NSFW"},
]


@pytest.mark.parametrize("output_format", ["webdataset", "files", "parquet"])
def test_what_img2dataset_fetched_is_read_in_each_of_its_formats(tmp_path: Path, output_format: str) -> None:
    for shard in (0, 1):
        fetch(tmp_path / "in", FETCHED, output_format=output_format, shard=shard)
    rows = made(Img2dataset(str(tmp_path / "in")), tmp_path)
    assert [(row["source_key"], row["caption"], row["AESTHETIC_SCORE"], row["url"]) for row in rows] == [
        ("000000000", "zero", 5.5, "u0"),
        ("000000003", "three", 0.0, "u3"),
        ("000010000", "zero", 5.5, "u0"),
        ("000010003", "three", 0.0, "u3"),
    ]
    first = rows[0]
    sizes = [first[name] for name in ("width", "height", "original_width", "original_height")]
    assert sizes == [24, 16, 240, 160]  # the stored picture's, and those before img2dataset reduced it
    assert first["source_sha256"] == "00"
    assert {"error_message", "source_status", "source_width", "source_original_width"} & set(first) == set()
    assert sorted(dropped(tmp_path / "out" / "train")) == [
        ("000000001", "failed_to_download"),
        ("000000002", "missing_caption"),
        ("000010001", "failed_to_download"),
        ("000010002", "missing_caption"),
    ]


@pytest.mark.parametrize("name", ["TEXT", "Text", "Caption"])
def test_captions_without_a_text_are_found_under_any_name(tmp_path: Path, name: str) -> None:
    rows = [{"jpg": encoded(picture(0)), name: "of the row", "url": "u"}]
    fetch(tmp_path / "in", rows, output_format="webdataset")
    assert [row["txt"] for row in made(Img2dataset(str(tmp_path / "in")), tmp_path)] == ["of the row"]


def test_machines_share_the_shards_by_their_numbers(tmp_path: Path) -> None:
    for shard in (0, 1, 2, 12):
        fetch(tmp_path / "in", FETCHED[:1], output_format="webdataset", shard=shard)
    rows = made(Img2dataset(str(tmp_path / "in"), shards="*[02468]", columns=["aesthetic"]), tmp_path)
    assert [(row["source_key"], row["aesthetic"], "url" in row) for row in rows] == [
        ("000000000", 5.5, False),
        ("000020000", 5.5, False),
        ("000120000", 5.5, False),
    ]


def test_a_shard_that_img2dataset_did_not_finish_is_never_taken_for_whole(tmp_path: Path) -> None:
    for shard in (0, 1):
        fetch(tmp_path / "in", FETCHED[:1], output_format="webdataset", shard=shard)
    (tmp_path / "in" / "00001_stats.json").unlink()
    (tmp_path / "in" / "00001.parquet").write_bytes(b"")  # being written
    (tmp_path / "in" / "_tmp").mkdir()
    with pytest.raises(ValueError, match=r"unfinished: got 1 shards without _stats.json \(00001 is the first\)"):
        made(Img2dataset(str(tmp_path / "in")), tmp_path)
    assert len(made(Img2dataset(str(tmp_path / "in"), unfinished="skip"), tmp_path)) == 1
    assert dropped(tmp_path / "out" / "train") == [("00001", "unfinished_shard")]
    (tmp_path / "in" / "00001.parquet").unlink()
    assert len(made(Img2dataset(str(tmp_path / "in"), unfinished="keep"), tmp_path)) == 2


@pytest.mark.parametrize("inside", [True, False])
def test_a_tar_that_ends_early_gives_what_is_whole_in_it(tmp_path: Path, inside: bool) -> None:
    fetch(tmp_path / "in", [FETCHED[0], FETCHED[3]], output_format="webdataset")
    path = tmp_path / "in" / "00000.tar"
    with tarfile.open(path) as tar:
        ends = [entry.offset_data + -(-entry.size // 512) * 512 for entry in tar]
    # Inside the second picture, or between it and its text, where no header tells.
    path.write_bytes(path.read_bytes()[: ends[3] - 512 if inside else ends[3]])
    assert [row["source_key"] for row in made(Img2dataset(str(tmp_path / "in")), tmp_path)] == ["000000000"]
    assert dropped(tmp_path / "out" / "train") == [("00000.tar", "broken_shard")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "folder: got .* with shards=.*, expected what img2dataset writes"),
        (["00000.tfrecord", "00000.parquet"], "expected the output format webdataset, files or parquet"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, files: list[str], message: str) -> None:
    (tmp_path / "in").mkdir()
    for name in files:
        (tmp_path / "in" / name).touch()
        (tmp_path / "in" / "00000_stats.json").touch()
    with pytest.raises(ValueError, match=message):
        made(Img2dataset(str(tmp_path / "in")), tmp_path)


def test_a_class_or_text_that_is_none_is_no_caption() -> None:
    view = RowView.of(
        ["image", "label", "text"], "image", ["label", "text"], None, where="t", labels={"label": ["cat", "dog"]}
    )
    rows = [(1, "words"), (-1, "words"), (None, "words"), (-1, float("nan")), (-1, None)]
    items = [view.item({"image": b"p", "label": label, "text": text}, name="0", root=Path()) for label, text in rows]
    assert [item.caption for item in items] == ["dog", "words", "words", "", ""]
    told = prepare(Item("0", image=b"p", columns={"caption": float("nan")}), Preparation())
    assert isinstance(told, Dropped) and told.reason == "missing_caption"
