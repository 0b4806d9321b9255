"""`ldm compare` and `ldm vote`: evaluations side by side, beside a paper, and judged by people."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import ROOT, read_json

from ldm.cli.main import main

sys.path.insert(0, str(ROOT / "tests/generation/report"))
from evaluation_folders import write_evaluation


@pytest.fixture
def two(folder: Path) -> Path:
    """A folder with two evaluations of different guidance."""
    for name, scale in (("a", 1.0), ("b", 3.0)):
        write_evaluation(
            folder / name, first_picture=int(50 * scale), fid=scale, protocol={"guidance": {"scale": scale}}
        )
    return folder


@pytest.fixture
def fails(two: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that is to fail, and gives its one line."""

    def execute(*words: str) -> str:
        assert main(list(words)) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return execute


def test_evaluations_stand_side_by_side(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "evaluations={before: a, after: b}", "out=page", "report.samples=2"]) == 0
    said = capsys.readouterr().out
    assert "2 evaluations in page" in said and "before" in said
    html = (two / "page/report.html").read_text()
    assert html.count("<img ") == 2 * 2 + 2 * 2 * 8
    assert {path.suffix for path in (two / "page/curves").iterdir()} == {".svg", ".png", ".json"}
    names = [one["name"] for one in read_json(two / "page/comparison.json")["evaluations"]]
    assert names == ["before", "after"]


def test_a_run_folder_means_its_newest_evaluation(two: Path) -> None:
    for name in ("a", "b"):
        place = two / "runs/toy/1/evaluations"
        place.mkdir(parents=True, exist_ok=True)
        (two / name).rename(place / name)
    (two / "runs/toy/1/config.yaml").write_text("card: null\n")
    assert main(["compare", "evaluations=runs/toy/1", "out=page"]) == 0
    assert "toy/1 b" in (two / "page/report.html").read_text()


def test_a_run_stands_beside_what_a_paper_published(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "evaluations=a", "card=paper/ldm4_celebahq", "out=page"]) == 0
    said = capsys.readouterr().out
    assert "protocol  num_samples: published 50000, measured 12" in said
    assert "protocol  steps: published 200, measured 20" in said
    found = read_json(two / "page/comparison.json")["papers"][0]
    assert found["figures"]["fid"] == {"published": 5.11, "measured": 1.0, "difference": pytest.approx(-4.11)}
    assert "sampler.name" in found["protocol_same"]
    assert "500 steps in table 1" in (two / "page/report.html").read_text()


def test_the_card_of_a_runs_own_experiment_is_taken_unasked(two: Path) -> None:
    place = two / "runs/toy/1"
    (place / "evaluations").mkdir(parents=True)
    (two / "a").rename(place / "evaluations/a")
    own = {"card": {"citation": "X", "table": "T", "published": {"fid": 2.0}, "protocol": {"steps": 20}}}
    (place / "config.yaml").write_text(json.dumps(own))
    assert main(["compare", "evaluations=runs/toy/1", "out=page"]) == 0
    assert read_json(two / "page/comparison.json")["papers"][0]["protocol_same"] == ["steps"]


def test_votes_go_from_page_to_verdict(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vote", "page", "evaluations={old: a, new: b}", "num_pairs=9"]) == 0
    assert "9 pairs to vote on in vote/vote.html" in capsys.readouterr().out
    assert main(["vote", "page", "evaluations={old: a, new: b}", "num_pairs=9"]) == 0
    key = read_json(two / "vote/vote_key.json")
    lines = [
        {"pair": pair, "choice": int(not flipped), "left": 0, "seconds": 1.5, "at": f"2026-01-01T00:00:0{pair}Z"}
        for pair, flipped in enumerate(key["flipped"])
    ]
    content = {"format": key["format"], "page": key["page"], "session": "s", "voter": "", "votes": lines}
    (two / "votes-1.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["vote", "count", "votes=votes-*.json", "interval=clopper_pearson"]) == 0
    said = capsys.readouterr().out
    # Three prompts, each seen with three seeds, that all agree.
    assert "undecided" in said and "new is preferred in 100.0% of 9 votes" in said
    verdict = read_json(two / "vote/verdict.json")
    assert (verdict["second"], verdict["effective"], verdict["high"]) == (9, 3, 1)
    assert (verdict["ties"], verdict["settings"]["ties"]) == (0, "half")


def test_mistakes_are_one_line_each(fails: Callable[..., str], two: Path) -> None:
    assert "evaluations: got none, expected folders that `ldm evaluate` wrote" in fails("compare")
    assert "evaluations: got nowhere, which holds no evaluation.json" in fails("compare", "evaluations=nowhere")
    assert "did you mean paper/ldm4_celebahq?" in fails("compare", "evaluations=a", "card=paper/ldm4_celeba")
    assert "samples: got -1, expected a whole number" in fails("compare", "evaluations=a", "report.samples=-1")
    assert "evaluations: got 1, expected two" in fails("vote", "page", "evaluations=a")
    assert "num_pairs: got 0, expected at least 1" in fails("vote", "page", "evaluations=[a,b]", "num_pairs=0")
    assert "votes: got none, expected files" in fails("vote", "count")
    (two / "votes-1.json").write_text("{}")
    assert "key: got vote/vote_key.json, which is no file" in fails("vote", "count", "votes=votes-1.json")
    assert main(["vote", "page", "evaluations=[a,b]"]) == 0
    assert "which holds another vote" in fails("vote", "page", "evaluations=[b,a]")
    assert "got no votes, expected what a vote page downloaded" in fails("vote", "count", "votes=votes-1.json")
    key = read_json(two / "vote/vote_key.json")
    for votes, words in ((None, "got no list of votes"), ([{"pair": 0, "choice": 1}], "expected a pair of the page")):
        content = {"format": key["format"], "page": key["page"], "session": "s", "votes": votes}
        (two / "votes-1.json").write_text(json.dumps(content))
        assert words in fails("vote", "count", "votes=votes-1.json")
