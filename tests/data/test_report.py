import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_shards import encode, good, noise, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.distance import pdist, squareform

from ldm.data import Record, write_shards
from ldm.data.filters import Filter
from ldm.data.report import bins, plan, report_shards
from ldm.data.similar import difference_hash, near_duplicates, white_border
from ldm.data.statistics import spread

WriteNoise = Callable[..., Path]
EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


def blobs(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures: two of one motif, one with a white border, with scores, a null and a caption full of HTML."""
    bordered = Image.new("RGB", (64, 48), "white")
    bordered.paste(blobs(3, (32, 24)), (16, 12))
    pictures = [blobs(0), blobs(1), blobs(0, (128, 96)), blobs(2), bordered]
    scores = [5.5, 0.0, None, 6.5, 7.0]
    records = (
        Record(picture, EVIL if i == 1 else f"picture {i}", {"aesthetic": score, "language": "en" if i else "de"})
        for i, (picture, score) in enumerate(zip(pictures, scores, strict=True))
    )
    write_shards(tmp_path / "set", records, samples_per_shard=2)
    return tmp_path / "set"


def test_the_numbers_are_those_of_the_samples(folder: Path, tmp_path: Path) -> None:
    filters = {
        "high": Filter("aesthetic >= 6", nulls="drop"),
        "lenient": Filter(["aesthetic >= 6", "language == 'en'"], nulls="keep"),
        "other": Filter("punsafe < 0.1"),
    }
    told = report_shards(folder, tmp_path / "report", filters=filters)
    assert told == json.loads((tmp_path / "report" / "report.json").read_text())
    assert (told["num_samples"], told["num_rows_read"], told["num_images_decoded"]) == (5, 5, 5)
    assert told["num_members"] == {"png": 5, "txt": 5, "json": 5}
    assert told["num_bordered"] == 1
    assert list(told["most_bordered"].values()) == [0.75]
    assert "white_border" in told["histograms"]
    assert told["num_without_caption"] == 0
    assert told["histograms"]["width"]["max"] == 128
    assert told["histograms"]["aspect_ratio"]["median"] == pytest.approx(4 / 3)
    scores = told["columns"]["aesthetic"]
    assert (scores["num_nulls"], scores["numbers"]["min"], sum(scores["numbers"]["counts"])) == (1, 0.0, 4)
    assert told["columns"]["language"]["most_frequent"] == {"en": 4, "de": 1}
    assert (told["filters"]["high"]["kept"], told["filters"]["lenient"]["kept"]) == (2, 3)
    assert told["filters"]["lenient"]["failed"] == [2, 1]
    assert told["filters"]["lenient"]["unknown"] == [1, 0]
    assert "punsafe: there is no such column" in told["filters"]["other"]["refused"]
    assert told["near_duplicates"]["groups"] == [["00000.tar: 000000000", "00001.tar: 000010000"]]


class Reader(HTMLParser):
    """Collects tags, their attributes and the text of a page, and checks that the tags close as they open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_shows_captions_as_text(folder: Path, tmp_path: Path) -> None:
    report_shards(folder, tmp_path / "report", filters={EVIL: Filter("`<b>x</b>` > 0", source=EVIL)})
    content = (tmp_path / "report" / "index.html").read_text()
    reader = Reader()
    reader.feed(content)
    assert reader.open == []
    assert "script" not in reader.tags
    assert "b" not in reader.tags
    assert EVIL in reader.text
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    sources = [value for name, value in reader.attributes if name in ("src", "href")]
    assert len(sources) == 5
    for source in sources:
        assert source.startswith("data:image/jpeg;base64,")
        assert max(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size) <= 112
    assert not re.findall(r"(?:href|src|url\()\s*=?\s*[\"']?https?:", content)
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in reader.attributes


def test_the_report_is_the_same_with_workers(folder: Path, tmp_path: Path) -> None:
    for name, workers in (("a", 0), ("b", 2)):
        report_shards(folder, tmp_path / name, filters={"high": Filter("aesthetic > 1")}, workers=workers)
    for file in ("report.json", "index.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_fewer_samples_are_looked_at_where_asked(folder: Path, tmp_path: Path) -> None:
    told = report_shards(folder, tmp_path / "report", rows=3, pictures=2, thumbnails=1)
    assert (told["num_samples"], told["num_rows_read"], told["num_images_decoded"]) == (5, 3, 2)
    assert (tmp_path / "report" / "index.html").read_text().count("<img") == 1
    none = report_shards(folder, tmp_path / "none", rows=0, pictures=0, thumbnails=0)
    assert (none["num_rows_read"], none["num_images_decoded"]) == (0, 0)


def test_what_is_looked_at_is_spread_over_all_shards(write_noise: WriteNoise) -> None:
    shards = sorted(write_noise(23).glob("*.tar"))
    tasks = plan(shards, rows=8, pictures=4, thumbnails=2)
    assert [len(task.rows) for task in tasks] == [2, 3, 2, 1]
    assert sum(len(task.images) for task in tasks) == 4
    assert all(task.thumbnails <= set(task.images) for task in tasks)
    assert sum(len(task.thumbnails) for task in tasks) == 2


def test_faulty_samples_and_shards_are_told_and_stop_nothing(tmp_path: Path) -> None:
    whole = encode(noise(size=(64, 64)), "JPEG")
    members = [
        *good("a"),
        *good("b", jpg=whole[:900]),
        *good("c", json=b"{"),
        *good("d", txt=None),
        *good("e", jpg=None),
    ]
    write_tar(tmp_path / "0.tar", members)
    (tmp_path / "1.tar").write_bytes(b"<html>")
    told = report_shards(tmp_path, tmp_path / "report", filters={"high": Filter("aesthetic > 5")})
    assert (told["num_samples"], told["num_images_decoded"], told["num_images_unreadable"]) == (5, 3, 1)
    assert "0.tar: b.jpg cannot be decoded" in told["images_unreadable"][0]
    assert told["num_without_caption"] == 1
    assert told["filters"]["high"]["kept"] == 4
    assert "1.tar: got no tar header" in told["shards_unreadable"][0]


def test_no_readable_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "1.tar").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"1\.tar: got no tar header"):
        report_shards(tmp_path, tmp_path / "report")


@pytest.mark.parametrize("options", [{"rows": -1}, {"pictures": -1}, {"distance": -2}, {"metadata": "xml"}])
def test_impossible_settings_are_refused(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: got "):
        report_shards(folder, tmp_path / "report", **options)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=25), st.integers(0, 12), st.data())
def test_groups_are_the_connected_components_of_close_hashes(
    hashes: list[int], distance: int, data: st.DataObject
) -> None:
    flips = st.tuples(st.sampled_from(hashes), st.sets(st.integers(0, 63), max_size=4))
    near = data.draw(st.lists(flips, max_size=8))
    hashes = hashes + [base ^ sum(1 << bit for bit in bits) for base, bits in near]
    bits = np.array([[value >> bit & 1 for bit in range(64)] for value in hashes])
    close = np.round(squareform(pdist(bits, "hamming")) * 64) <= distance
    reach = np.linalg.matrix_power(close.astype(float), len(hashes)) > 0
    expected = {tuple(np.flatnonzero(row).tolist()) for row in reach if row.sum() > 1}
    assert {tuple(group) for group in near_duplicates(np.array(hashes, dtype=np.uint64), distance=distance)} == expected


def test_hashes_survive_scale_and_compression_and_tell_motifs_apart() -> None:
    original = blobs(0, (256, 192))
    small = original.resize((100, 75))
    squeezed = Image.open(io.BytesIO(encode(original, "JPEG", quality=30)))
    darker = Image.eval(original, lambda value: value * 3 // 4)
    first = difference_hash(original)
    assert all((difference_hash(image) ^ first).bit_count() <= 4 for image in (small, squeezed, darker))
    assert all((difference_hash(blobs(seed)) ^ first).bit_count() > 12 for seed in range(1, 6))


@pytest.mark.parametrize(
    ("box", "expected"),
    [((0, 0, 100, 80), 0.0), ((25, 0, 75, 80), 0.5), ((0, 20, 100, 80), 0.25), ((50, 40, 50, 40), 1.0)],
)
def test_white_borders_are_the_share_of_the_area_around_the_ink(
    box: tuple[int, int, int, int], expected: float
) -> None:
    image = Image.new("RGB", (100, 80), (250, 250, 250))
    image.paste((200, 30, 30), box)
    assert white_border(image) == pytest.approx(expected)


def test_white_inside_a_picture_is_no_border() -> None:
    image = Image.new("RGB", (100, 80), "black")
    image.paste("white", (10, 10, 90, 70))
    assert white_border(image) == 0.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6) | st.integers(-100, 100).map(float), min_size=1, max_size=50))
def test_every_finite_number_falls_into_one_bin(values: list[float]) -> None:
    told = bins([*values, float("inf")])
    assert sum(told["counts"]) == len(values)
    assert len(told["edges"]) == len(told["counts"]) + 1
    assert told["num_not_finite"] == 1


def test_few_whole_numbers_get_a_bin_each() -> None:
    assert bins([1, 3, 3])["counts"] == [1, 0, 2]


@given(st.integers(0, 200), st.integers(0, 200))
def test_what_is_spread_is_even_and_inside(count: int, chosen: int) -> None:
    places = spread(count, chosen)
    assert len(places) == min(count, chosen)
    assert len(set(places.tolist())) == len(places)
    if 1 < len(places) < count:
        gaps = np.diff(places)
        assert gaps.max() - gaps.min() <= 1
