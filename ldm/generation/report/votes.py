"""What votes between two evaluations say: a share with a confidence interval."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = "ldm-votes-1"
INTERVALS = ("wilson", "clopper_pearson")
TIES = ("half", "drop")
Choice = str | int
"""0 or 1, one of the two pictures of a pair as the page holds them, or "tie"."""


@dataclass(frozen=True)
class Vote:
    """One person's choice between two pictures: `share` is 1 for the second evaluation, 0 for the first, 0.5 a tie."""

    session: str
    pair: int
    prompt: str
    share: float
    chose_left: bool | None
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """The share of preferences that the second evaluation got, and how sure that is.

    Args:
        share, low, high: from 0 to 1.
        num_votes: that were counted, ties that were dropped left out.
        num_prompts: different ones among them; votes on one prompt are no independent evidence.
        effective: as many independent votes would say as much.
        first, second, ties: the numbers of votes.
        num_repeated: votes that a later one of the same person on the same pair replaced.
        left: the share of decided votes for the picture on the left, 0.5 without a habit; None where none is decided.
        num_sessions: different voters.
        seconds: the median of a vote.
    """

    share: float
    low: float
    high: float
    num_votes: int
    num_prompts: int
    effective: float
    first: int
    second: int
    ties: int
    num_repeated: int
    left: float | None
    num_sessions: int
    seconds: float

    @property
    def preferred(self) -> int | None:
        """0 or 1 for the evaluation that is preferred, None where the interval holds one half."""
        return 1 if self.low > 0.5 else 0 if self.high < 0.5 else None


def read_votes(files: Sequence[Path], key: Mapping[str, Any]) -> tuple[list[Vote], int]:
    """(the last vote of each person on each pair, how many earlier ones were left out), of downloaded files.

    Args:
        key: of the page: `{"page": id, "flipped": [bool, ...], "prompts": [...], ...}`.

    Raises:
        ValueError: a file is of another page, or none that a vote page wrote.
    """
    found: dict[tuple[str, int], tuple[str, Vote]] = {}
    num_repeated, seen = 0, set()
    for file in files:
        for line in _lines(file, key):
            stamp = json.dumps(line, sort_keys=True)
            vote = _vote(line, key, file)
            place = (vote.session, vote.pair)
            if stamp in seen:  # a file that was downloaded twice
                continue
            seen.add(stamp)
            num_repeated += place in found
            if place not in found or str(line["at"]) >= found[place][0]:
                found[place] = (str(line["at"]), vote)
    return [vote for _, vote in found.values()], num_repeated


def count(
    votes: Sequence[Vote],
    *,
    interval: str = "wilson",
    confidence: float = 0.95,
    ties: str = "half",
    num_repeated: int = 0,
) -> Verdict:
    """What votes say.

    Votes on one prompt are alike, so the interval is that of as many independent votes as have the variance which
    prompts show between them (the design effect of a ratio of cluster totals; Rao & Scott 1992, Korn & Graubard 1998).

    Args:
        interval: wilson, or clopper_pearson, which is exact and wider.
        ties: half counts one half for each side, drop leaves them out.

    Raises:
        ValueError: a choice or the confidence is none, or nothing is left to count.
    """
    if interval not in INTERVALS or ties not in TIES or not 0 < confidence < 1:
        raise ValueError(
            f"got interval={interval}, ties={ties}, confidence={confidence}; expected {' or '.join(INTERVALS)}, "
            f"{' or '.join(TIES)}, and a number between 0 and 1"
        )
    counted = [vote for vote in votes if ties == "half" or vote.share != 0.5]
    if not counted:
        raise ValueError(f"got {len(votes)} votes, of which none prefers a side, expected at least one; vote on")
    share = sum(vote.share for vote in counted) / len(counted)
    effective = effective_number(counted)
    bounds = wilson if interval == "wilson" else clopper_pearson
    low, high = bounds(share * effective, effective, confidence=confidence)
    decided = [vote for vote in votes if vote.chose_left is not None]
    sides = Counter(vote.share for vote in votes)
    return Verdict(
        share=share,
        low=low,
        high=high,
        num_votes=len(counted),
        num_prompts=len({vote.prompt for vote in counted}),
        effective=effective,
        first=sides[0.0],
        second=sides[1.0],
        ties=sides[0.5],
        num_repeated=num_repeated,
        left=sum(vote.chose_left is True for vote in decided) / len(decided) if decided else None,
        num_sessions=len({vote.session for vote in votes}),
        seconds=_median([vote.seconds for vote in votes]),
    )


def effective_number(votes: Iterable[Vote]) -> float:
    """How many independent votes say as much: all where each has a prompt of its own, at least one a prompt."""
    sums: dict[str, tuple[float, int]] = {}
    for vote in votes:
        total, n = sums.get(vote.prompt, (0.0, 0))
        sums[vote.prompt] = (total + vote.share, n + 1)
    n, groups = sum(size for _, size in sums.values()), len(sums)
    share = sum(total for total, _ in sums.values()) / n
    if groups == n or groups < 2:
        return float(groups)
    spread = sum((total - size * share) ** 2 for total, size in sums.values())
    variance = groups / (groups - 1) * spread / n**2
    if variance == 0:  # every prompt agrees, which says nothing about how alike its votes are
        return float(groups)
    return min(max(share * (1 - share) / variance, groups), n)


def wilson(successes: float, trials: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927); successes need not be whole."""
    from scipy.special import ndtri

    z = float(ndtri(0.5 + confidence / 2))
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def clopper_pearson(successes: float, trials: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share (Clopper & Pearson 1934), as quantiles of beta distributions."""
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    failures = trials - successes
    low = 0.0 if successes <= 0 else float(betaincinv(successes, failures + 1, tail))
    high = 1.0 if failures <= 0 else float(betaincinv(successes + 1, failures, 1 - tail))
    return low, high


def _lines(file: Path, key: Mapping[str, Any]) -> list[dict[str, Any]]:
    try:
        content = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: got no JSON ({error}), expected what a vote page downloaded") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{file}: got no votes, expected what a vote page downloaded ({FORMAT})")
    if not isinstance(content.get("votes"), list) or not isinstance(content.get("session"), str):
        raise ValueError(
            f"{file}: got no list of votes by a session, expected what a vote page downloaded; do it again"
        )
    if content.get("page") != key["page"]:
        raise ValueError(
            f"{file}: got votes of page {content.get('page')}, expected those of {key['page']}; give its own key"
        )
    return [{**vote, "session": content["session"]} for vote in content["votes"]]


def _vote(line: Mapping[str, Any], key: Mapping[str, Any], file: Path) -> Vote:
    pair, choice = line.get("pair"), line.get("choice")
    is_whole = {"at", "left", "seconds"} <= line.keys() and pair in range(len(key["flipped"]))
    if choice not in (0, 1, "tie") or not is_whole:
        raise ValueError(f"{file}: got {dict(line)}, expected a pair of the page and 0, 1 or tie; download it again")
    share = 0.5 if choice == "tie" else float(choice != key["flipped"][pair])
    chose_left = None if choice == "tie" else choice == line["left"]
    return Vote(line["session"], int(line["pair"]), key["prompts"][pair], share, chose_left, float(line["seconds"]))


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
