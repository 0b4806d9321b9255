"""Votes: the page keeps the names to itself, and the count knows what votes are worth."""

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_folders import write_evaluation
from hypothesis import given
from hypothesis import strategies as st

from ldm.generation.report import EvaluationFolder, count, make_ballot, read_votes
from ldm.generation.report.vote_page import shared_samples
from ldm.generation.report.votes import Vote, clopper_pearson, effective_number, wilson


def votes(shares: list[float], *, prompts: list[str] | None = None, session: str = "s") -> list[Vote]:
    named = prompts or [str(i) for i in range(len(shares))]
    return [Vote(session, i, p, s, None, 1.0) for i, (s, p) in enumerate(zip(shares, named, strict=True))]


def test_intervals_equal_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148 and 0 of 20 at 95 %.
    for (successes, trials), low, high in (
        ((81, 263), 0.2553, 0.3662),
        ((15, 148), 0.0624, 0.1605),
        ((0, 20), 0, 0.1611),
    ):
        assert wilson(successes, trials) == pytest.approx((low, high), abs=6e-5)
    for (successes, trials), low, high in (
        ((81, 263), 0.2527, 0.3676),
        ((15, 148), 0.0578, 0.1617),
        ((0, 20), 0, 0.1684),
    ):
        assert clopper_pearson(successes, trials) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(0, 50), st.integers(1, 50), st.floats(0.5, 0.99))
def test_the_exact_interval_holds_the_share_and_mirrors(successes: int, more: int, confidence: float) -> None:
    trials = successes + more
    for bounds in (wilson, clopper_pearson):
        low, high = bounds(successes, trials, confidence=confidence)
        assert 0 <= low <= successes / trials + 1e-12 and successes / trials - 1e-12 <= high <= 1
        mirrored = bounds(more, trials, confidence=confidence)
        assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_votes_on_prompts_of_their_own_are_independent() -> None:
    verdict = count(votes([1.0] * 30 + [0.0] * 10))
    assert (verdict.share, verdict.effective, verdict.preferred) == (0.75, 40, 1)
    assert (verdict.low, verdict.high) == wilson(30, 40)
    assert count(votes([0.0] * 30 + [1.0] * 10)).preferred == 0
    assert count(votes([0.0, 1.0] * 20)).preferred is None


def test_votes_that_repeat_a_prompts_vote_say_nothing_new() -> None:
    prompts = [str(i) for i in range(20)]
    shares = [1.0] * 12 + [0.0] * 8
    five_times = count(votes(shares * 5, prompts=prompts * 5))
    # All voters agree on each prompt: as much evidence as one of them gives, to the n - 1 of a variance.
    assert five_times.effective == pytest.approx(20, rel=0.06)
    assert five_times.num_prompts == 20
    spread = votes([1.0, 0.0] * 50, prompts=[prompt for prompt in prompts for _ in range(5)])
    assert effective_number(spread) == 100


def test_ties_count_half_or_not_at_all() -> None:
    given_votes = votes([1.0, 1.0, 0.0, 0.5, 0.5])
    half, drop = count(given_votes), count(given_votes, ties="drop")
    assert (half.share, half.num_votes, half.ties) == (0.6, 5, 2)
    assert (drop.share, drop.num_votes, drop.ties) == (pytest.approx(2 / 3), 3, 2)
    assert count(votes([0.5] * 4)).share == 0.5
    with pytest.raises(ValueError, match="got 4 votes, of which none prefers a side"):
        count(votes([0.5] * 4), ties="drop")
    with pytest.raises(ValueError, match="got interval=normal"):
        count(given_votes, interval="normal")


KEY: dict[str, Any] = {"page": "p", "flipped": [False, True], "prompts": ["red", "blue"]}


def write_votes(path: Path, lines: list[dict[str, Any]], **changes: Any) -> Path:
    rows = [{"left": 0, "seconds": 2.0, "at": f"2026-01-01T00:00:{i:02d}Z", **line} for i, line in enumerate(lines)]
    path.write_text(json.dumps({"format": "ldm-votes-1", "page": "p", "session": "s", "votes": rows, **changes}))
    return path


def test_the_key_says_whose_picture_was_chosen(tmp_path: Path) -> None:
    lines = [{"pair": 0, "choice": 1}, {"pair": 1, "choice": 1}]
    found, _ = read_votes([write_votes(tmp_path / "a", lines)], KEY)
    assert [(vote.prompt, vote.share, vote.chose_left) for vote in found] == [("red", 1.0, False), ("blue", 0.0, False)]


def test_a_persons_last_vote_on_a_pair_counts(tmp_path: Path) -> None:
    first = write_votes(tmp_path / "a", [{"pair": 0, "choice": 1}])
    again = write_votes(tmp_path / "b", [{"pair": 0, "choice": 1}, {"pair": 0, "choice": "tie"}])
    other = write_votes(tmp_path / "c", [{"pair": 0, "choice": 1}], session="t")
    found, num_repeated = read_votes([again, first, other], KEY)
    assert sorted((vote.session, vote.share) for vote in found) == [("s", 0.5), ("t", 1.0)]
    assert num_repeated == 1


def test_votes_of_another_page_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got votes of page q, expected those of p"):
        read_votes([write_votes(tmp_path / "a", [], page="q")], KEY)
    with pytest.raises(ValueError, match="got no votes, expected what a vote page downloaded"):
        read_votes([write_votes(tmp_path / "a", [], format="x")], KEY)
    with pytest.raises(ValueError, match="expected a pair of the page and 0, 1 or tie"):
        read_votes([write_votes(tmp_path / "a", [{"pair": 7, "choice": 1}])], KEY)


def folders(tmp_path: Path) -> list[EvaluationFolder]:
    paths = [write_evaluation(tmp_path / name, first_picture=50 * i) for i, name in enumerate(("secret_a", "secret_b"))]
    return [EvaluationFolder(path) for path in paths]


def test_the_page_does_not_tell_which_picture_is_whose(tmp_path: Path) -> None:
    first, second = folders(tmp_path)
    ballot = make_ballot(first, second)
    assert "secret" not in ballot.html and "fid" not in ballot.html
    assert [one["name"] for one in ballot.key["evaluations"]] == ["secret_a", "secret_b"]
    assert 2 <= sum(ballot.key["flipped"]) <= 10
    assert ballot.html.count("data:image/webp;base64,") == 24
    assert "http://" not in ballot.html and "https://" not in ballot.html
    # A prompt cannot end the element that holds the pairs.
    assert "<b>" not in ballot.html


def test_the_same_call_makes_the_same_page_and_fewer_pairs_are_spread(tmp_path: Path) -> None:
    first, second = folders(tmp_path)
    assert make_ballot(first, second) == make_ballot(first, second)
    assert make_ballot(first, second, num_pairs=4).key["indices"] == [[0, 0], [3, 3], [6, 6], [9, 9]]


def test_pictures_of_one_prompt_and_seed_belong_together(tmp_path: Path) -> None:
    first = EvaluationFolder(write_evaluation(tmp_path / "a", prompts=("x",), seed=0))
    later = EvaluationFolder(write_evaluation(tmp_path / "b", prompts=("x",), seed=9))
    assert shared_samples(first, later) == [(9, 0), (10, 1), (11, 2)]
    other = EvaluationFolder(write_evaluation(tmp_path / "c", prompts=("y",)))
    with pytest.raises(ValueError, match="share no picture of one prompt and seed"):
        make_ballot(first, other)
