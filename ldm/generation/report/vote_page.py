"""A page on which a person votes between two evaluations without knowing which is which.

Each pair is the same prompt and seed. Which evaluation comes first in a pair is drawn for every pair and written into a
key beside the page, so that the page itself, its source included, tells nobody. The browser draws the order of the
pairs and the sides for each person, and keeps what was voted.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ldm.generation.report.gallery import embedded
from ldm.generation.report.reading import EvaluationFolder
from ldm.generation.report.votes import FORMAT
from ldm.pages.page import page

# Pixels of the longer side of a picture that is voted on.
SIDE = 512


@dataclass(frozen=True)
class Ballot:
    """A page to vote on, and the key that says what the votes mean."""

    html: str
    key: dict[str, Any]


def shared_samples(first: EvaluationFolder, second: EvaluationFolder) -> list[tuple[int, int]]:
    """Places (in the first, in the second) of pictures of the same prompt, labels and seed, in the first's order.

    Where one of them tells no seeds, as other people's pictures do not, pictures of the same number belong together.
    """
    if not len(first) or not len(second):
        return []
    if first.sample(0).seed is None or second.sample(0).seed is None:
        return [(index, index) for index in range(min(len(first), len(second)))]
    seen: dict[tuple[Any, ...], int] = {}
    for index in range(len(second)):
        seen.setdefault(_identity(second, index), index)
    places = [(index, seen.get(_identity(first, index))) for index in range(len(first))]
    return [(one, other) for one, other in places if other is not None]


def make_ballot(
    first: EvaluationFolder, second: EvaluationFolder, *, num_pairs: int = 100, seed: int = 0, question: str = ""
) -> Ballot:
    """A page with at most `num_pairs` pairs, evenly spread over those that both evaluations have.

    Args:
        seed: of the draw of what comes first in a pair.
        question: what the person is asked.

    Raises:
        ValueError: they have no picture of the same prompt and seed, or num_pairs is below 1.
    """
    if num_pairs < 1:
        raise ValueError(f"num_pairs: got {num_pairs}, expected at least 1")
    shared = shared_samples(first, second)
    if not shared:
        raise ValueError(
            f"got {first.path} and {second.path}, which share no picture of one prompt and seed, expected some; "
            "evaluate both with the same prompts and seed"
        )
    chosen = spread(shared, num_pairs)
    draw = random.Random(f"{seed} {first.path.name} {second.path.name}")
    flipped = [draw.random() < 0.5 for _ in chosen]
    samples = [first.sample(one) for one, _ in chosen]
    pairs = []
    for (one, other), sample, flip in zip(chosen, samples, flipped, strict=True):
        shown = [embedded(first.picture(one), side=SIDE)[0], embedded(second.picture(other), side=SIDE)[0]]
        pairs.append({"told": sample.told, "pictures": shown[::-1] if flip else shown})
    content = json.dumps({"format": FORMAT, "question": question, "pairs": pairs})
    name = hashlib.sha256(content.encode()).hexdigest()[:16]
    key = {
        "format": FORMAT,
        "page": name,
        "evaluations": [{"name": one.name, "path": str(one.path.absolute())} for one in (first, second)],
        "flipped": flipped,
        "prompts": [sample.told for sample in samples],
        "seeds": [sample.seed for sample in samples],
        "indices": [list(places) for places in chosen],
    }
    return Ballot(_page(name, pairs, question or "Which picture is better?"), key)


def spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, evenly spread over all of them."""
    if len(values) <= count:
        return list(values)
    return [values[i * len(values) // count] for i in range(count)]


def _identity(folder: EvaluationFolder, index: int) -> tuple[Any, ...]:
    sample = folder.sample(index)
    return (sample.prompt, sample.seed, *sorted(sample.labels.items()))


def _page(name: str, pairs: Sequence[dict[str, Any]], question: str) -> str:
    # In a script element only "</" and "<!--" have a meaning.
    data = json.dumps({"format": FORMAT, "page": name, "question": question, "pairs": pairs}).replace("<", "\\u003c")
    body = _resource("vote.html").replace("{{pairs}}", data)
    return page("Which is better?", [("Vote", body)], style=_resource("vote.css"), script=_resource("vote.js"))


def _resource(name: str) -> str:
    return files("ldm.generation.report").joinpath(name).read_text(encoding="utf-8")
