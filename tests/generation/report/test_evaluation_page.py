"""Pages of evaluations: whole in themselves, readable without eyes, and honest about what differs."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_folders import KEY, PROTOCOL, drawn, write_evaluation, write_features, write_reference

from ldm.generation.report import Amounts, Card, EvaluationFolder, axes_told, compare, curves, report_page
from ldm.generation.report.neighbours import nearest_real, search
from ldm.generation.report.reading import picture_of

VOID = {"meta", "img", "br", "input"}


class Page(HTMLParser):
    """What a test asks of a page: its elements with their attributes, its text, and whether they nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.elements if name == tag)


@pytest.fixture
def two(tmp_path: Path) -> list[EvaluationFolder]:
    """Evaluations of other guidance, resize and pictures; sample 5 of the first equals real image 3."""
    real = np.random.default_rng(0).normal(size=(40, 6))
    write_features(tmp_path / "cache", real, describe=False)
    reference = write_reference(tmp_path / "real")
    drawn(5).save(reference / "0003.png")
    told = {**PROTOCOL["reference"], "path": str(reference), "features_folder": str(tmp_path / "cache")}
    folders = []
    for name, scale, resize in (("one", 1.0, "bilinear"), ("two", 3.0, "bicubic")):
        guidance = {"scale": scale, "rescale": 0.0, "interval": None}
        folder = write_evaluation(
            tmp_path / name,
            first_picture=0 if name == "one" else 100,
            fid=10 + scale,
            clip=25 + scale,
            protocol={"reference": told, "guidance": guidance},
            resize=resize,
        )
        features = np.random.default_rng(1).normal(size=(12, 6))
        features[5] = real[3]
        write_features(folder, features)
        folders.append(EvaluationFolder(folder))
    return folders


def test_a_page_needs_no_other_file_and_every_picture_has_words(two: list[EvaluationFolder]) -> None:
    html = report_page(two, curves=curves(two), amounts=Amounts(samples=6, ranked=3, neighbours=2))
    page = Page(html)
    pictures = list(page.all("img"))
    assert len(pictures) == 2 * 6 + 2 * 2 * 3 + 2 * 2 * 2 * 5
    assert all((picture["src"] or "").startswith("data:image/webp;base64,") for picture in pictures)
    assert all(picture["alt"] and picture["width"] and picture["height"] for picture in pictures)
    assert all(svg["role"] == "img" and "FID" in (svg["aria-label"] or "") for svg in list(page.all("svg"))[:2])
    assert not re.search(r"https?://", html) and "url(" not in html
    assert [tag for tag, _ in page.elements if tag in ("script", "link", "iframe", "object")] == []
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert (policy or "").startswith("default-src 'none'")


def test_text_of_prompts_stays_text(two: list[EvaluationFolder]) -> None:
    page = Page(report_page(two))
    assert "a <b>blue</b> disc & more, seed 1" in page.text
    assert not list(page.all("b"))


def test_what_differs_is_named_and_marked(two: list[EvaluationFolder]) -> None:
    html = report_page(two)
    assert "fid was measured differently: resize" in Page(html).text
    rows = re.findall(r"<tr>.*?</tr>", html)
    marked = {re.sub("<.*?>", "", row.partition("</th>")[0]) for row in rows if "≠" in row}
    assert marked == {"≠ fid", "≠ guidance.scale", "≠ fid.resize"}
    # Clip score was measured by one protocol, with whatever guidance.
    assert any("clip_score" in row and "≠" not in row for row in rows)


def test_evaluations_of_one_name_are_refused(two: list[EvaluationFolder]) -> None:
    with pytest.raises(ValueError, match="each of a name of its own"):
        report_page([two[0], two[0]])


def test_evaluations_of_a_sweep_go_by_what_was_varied(two: list[EvaluationFolder]) -> None:
    assert axes_told(two) == ["guidance scale 1", "guidance scale 3"]


def test_the_nearest_real_image_is_found_and_shown(two: list[EvaluationFolder]) -> None:
    nearest = nearest_real(two[0], k=2)
    assert nearest is not None
    assert (nearest.numbers[5, 0], nearest.distances[5, 0]) == (3, pytest.approx(0, abs=1e-6))
    real = two[0].reference_pictures()
    assert real is not None
    assert picture_of(real[3]).tobytes() == two[0].picture(5).tobytes()
    assert "real image 3, at distance 0" in report_page(two[:1])


def test_neighbours_of_training_images_are_found_by_pixels(two: list[EvaluationFolder], tmp_path: Path) -> None:
    html = report_page(two[:1], amounts=Amounts(neighbours=1, training=str(tmp_path / "real")))
    assert 'alt="training image 3, at distance 0"' in html
    with pytest.raises(ValueError, match="got nowhere, expected a folder"):
        report_page(two[:1], amounts=Amounts(training="nowhere"))


def test_training_images_that_an_evaluation_knows_come_before_its_reference(
    two: list[EvaluationFolder], tmp_path: Path
) -> None:
    pictures = write_reference(tmp_path / "train", num=21, first_picture=500)
    features = np.random.default_rng(2).normal(size=(11, 6)) + 9
    features[7] = next(own for _, _, own in two[0].features())[2]
    write_features(tmp_path / "trained", features)
    told = {"path": str(pictures), "count": 21, "every": 2, "preprocessing": {"resolution": 32}}
    told |= {"network": KEY, "features_folder": str(tmp_path / "trained")}
    (two[0].path / "training.json").write_text(json.dumps(told))
    html = report_page(two[:1])
    # Row 7 of every second image.
    assert 'alt="training image 14, at distance 0"' in html
    assert 'alt="real image' not in html
    assert "among 11 training images. A sample that equals its neighbour was learned by heart" in Page(html).text
    # Without a network's features, by pixels.
    (two[0].path / "training.json").write_text(json.dumps({**told, "network": None, "features_folder": None}))
    del two[0].training
    assert "between pixels at 16 x 16, among 21 training images" in Page(report_page(two[:1])).text


def test_a_reference_that_changed_is_not_shown(two: list[EvaluationFolder], tmp_path: Path) -> None:
    (tmp_path / "real" / "0039.png").unlink()
    assert two[0].reference_pictures() is None
    assert "not there any more" in Page(report_page(two[:1])).text


def test_search_equals_all_distances_at_once() -> None:
    random = np.random.default_rng(0)
    queries, real = random.normal(size=(1100, 3)).astype(np.float32), random.normal(size=(2100, 3)).astype(np.float32)
    distances, numbers = search(queries, real, k=3)
    everything = np.linalg.norm(queries[:, None].astype(float) - real.astype(float), axis=2)
    np.testing.assert_allclose(distances, np.sort(everything, axis=1)[:, :3], rtol=1e-6)
    np.testing.assert_array_equal(numbers, np.argsort(everything, axis=1)[:, :3])


def test_best_and_worst_are_those_of_the_scores(two: list[EvaluationFolder]) -> None:
    html = report_page(two[:1], amounts=Amounts(samples=0, ranked=2, neighbours=0))
    captions = re.findall(r"<figcaption>(\d+)  ", html)
    assert captions == ["31", "30", "20", "21"]


def test_a_score_of_which_less_is_better_ranks_the_other_way(two: list[EvaluationFolder]) -> None:
    two[0].metrics["clip_score"]["higher_is_better"] = False
    html = report_page(two[:1], amounts=Amounts(samples=0, ranked=2, neighbours=0))
    assert re.findall(r"<figcaption>(\d+)  ", html) == ["20", "21", "31", "30"]


def test_an_unfinished_shard_and_an_unfinished_evaluation_are_told(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "run")
    (folder / "samples/00001.done").unlink()
    opened = EvaluationFolder(folder)
    assert len(opened) == 6
    with pytest.raises(IndexError, match="got sample 6, expected one below 6"):
        opened.picture(6)
    (folder / "evaluation.json").unlink()
    with pytest.raises(ValueError, match=r"holds no evaluation.json, expected a folder that `ldm evaluate` finished"):
        EvaluationFolder(folder)


def test_other_peoples_pictures_are_read_where_they_lie(tmp_path: Path) -> None:
    pictures = write_reference(tmp_path / "theirs", num=3, first_picture=50)
    folder = tmp_path / "measured"
    folder.mkdir()
    images = {"path": str(pictures), "count": 3, "sha256": "x", "preprocessing": {"resolution": 32}}
    (folder / "evaluation.json").write_text(json.dumps({"fid": 3.0, "protocol": {"images": images}}))
    opened = EvaluationFolder(folder)
    assert (len(opened), opened.sample(1).seed) == (3, None)
    assert opened.picture(1).tobytes() == drawn(51).tobytes()
    assert len(list(Page(report_page([opened])).all("img"))) == 3


def card(**changes: Any) -> Card:
    node = {
        "citation": "Authors, title, 2022",
        "table": "table 1",
        "published": {"fid": 10.0, "clip_score": 30.0, "recall": 0.5},
        "protocol": {
            "num_samples": 50000,
            "sampler": "ddim",
            "steps": 20,
            "guidance": {"scale": 1},
            "fid.resize": "tf",
        },
        "contradictions": ["200 steps here, 500 there."],
    }
    return Card.read({**node, **changes}, source="a.yaml")


def test_a_card_is_compared_figure_by_figure_and_its_protocol_setting_by_setting(two: list[EvaluationFolder]) -> None:
    found = compare(card(), two[0])
    figures = [(one.name, one.published, one.measured, one.difference) for one in found.figures]
    assert figures == [("fid", 10, 11, 1), ("clip_score", 30, 26, -4), ("recall", 0.5, None, None)]
    different = [(one.name, one.published, one.measured) for one in found.differences]
    assert different == [("num_samples", 50000, 12), ("fid.resize", "tf", "bilinear")]
    assert found.agreeing == ["sampler", "steps", "guidance.scale"]
    text = Page(report_page(two[:1], comparisons=[found])).text
    assert "≠ num_samples 50,000 12" in text
    assert "+10.0 %" in text
    assert "The sources contradict each other: 200 steps here, 500 there." in text


def test_a_published_fid_beside_one_of_other_features_is_named(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "one")
    content = json.loads((folder / "evaluation.json").read_text())
    networks = {"ldm.metrics.RandomFeatures": False, "Inception-v3 2015-12-05": True}
    for network, is_same in networks.items():
        content["metrics"]["fid"]["protocol"] = {"features": {"network": network}}
        (folder / "evaluation.json").write_text(json.dumps(content))
        found = compare(card(), EvaluationFolder(folder))
        assert ("fid.features.network" in found.agreeing) is is_same
        assert ("fid.features.network" in [one.name for one in found.differences]) is not is_same


def test_a_wrong_card_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a.yaml: got card.protocl, which a card has not; did you mean protocol\?"):
        card(protocl={})
    with pytest.raises(ValueError, match=r"a\.yaml: got a card without published"):
        card(published=None)
    with pytest.raises(ValueError, match=r"got card\.published\.fid='5', expected a number"):
        card(published={"fid": "5"})
    with pytest.raises(ValueError, match=r"a\.yaml: got no card"):
        Card.read(None, source="a.yaml")
