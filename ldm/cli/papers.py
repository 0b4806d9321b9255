"""`ldm papers`: published runs beside what is built and what was measured."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from ldm.cli.console import CHECK_FAILED, heading, say, show
from ldm.cli.errors import RunFailed, UserError, user_mistakes
from ldm.cli.evaluation_report import tell_card
from ldm.cli.meta import PER_BILLION, PER_MILLION, Part
from ldm.cli.papers_build import Library, Paper, as_printed, evaluations_of

if TYPE_CHECKING:
    from ldm.generation.report import Card

HEADLINE = ("fid", "inception_score", "rfid", "psnr", "clip_score")


def papers(config: DictConfig, overrides: Sequence[str]) -> None:
    """Lists the cards, shows one, or checks them.

    Raises:
        UserError: there is no such card.
        RunFailed: a check found something.
    """
    with user_mistakes():
        library = Library()
    asked = OmegaConf.to_container(config)["name"]  # type: ignore[index, call-overload]
    names = None if asked is None else asked if isinstance(asked, list) else [asked]
    if config.check:
        check(library, library.names if names is None else names)
    elif names is None:
        list_all(library.papers())
    else:
        for paper in library.papers(names):
            show_one(paper, Path(config.paths.runs).expanduser())


def check(library: Library, names: Sequence[str]) -> None:
    """Says what is wrong with each card.

    Raises:
        RunFailed: something is.
    """
    from ldm.cli.papers_check import faults

    started, wrong, explained = time.monotonic(), 0, 0
    for name in names:
        try:
            paper = library.paper(name)
            found = faults(paper)
            explained += len(paper.card.differences)
        except UserError as error:
            found = [str(error)]
        wrong += len(found)
        for line in found:
            say(f"{name}: {line}", style="red")
    seconds = time.monotonic() - started
    say(f"{len(names)} cards in {seconds:.0f} s: {wrong} faults, {explained} differences explained")
    if wrong:
        raise RunFailed(f"{wrong} faults in paper cards", CHECK_FAILED)


def list_all(chosen: Sequence[Paper]) -> None:
    """Prints a line a card."""
    rows = [
        [
            paper.experiment.rpartition("/")[2],
            paper.card.name,
            _counts(paper.card),
            _number(paper.card.training.get("batch_size")),
            _number(paper.card.training.get("lr")),
            _number(paper.card.training.get("steps")),
            ", ".join(f"{name} {paper.card.published[name]:g}" for name in HEADLINE if name in paper.card.published),
        ]
        for paper in chosen
    ]
    _table(["card", "title", "million parameters", "batch", "lr", "steps", "published"], rows)
    say(f"{len(rows)} cards; `ldm papers NAME` shows one, `ldm reproduce NAME` runs it", style="dim")


def _counts(card: Card) -> str:
    """What a card says of its parts; where it leaves out the network, other parts would be read as that."""
    given = card.parameters
    if "network" in card.total_of and "network" not in given:
        return f"{given['total']} in all" if "total" in given else "–"
    return " + ".join(str(given[name]) for name in ("network", "encoder", "first_stage") if name in given) or "–"


def show_one(paper: Paper, runs: Path) -> None:
    """Prints all that a card says, what is built, and what was measured."""
    card = paper.card
    with user_mistakes():
        parts = paper.parts(flops=True)
    heading(card.name)
    say(f"  {card.citation}; {card.table}")
    say(f"  {card.url}")
    hours = f", {card.hours:g} hours of it" if card.hours else ""
    say(f"  trained on: {card.hardware}{hours}")
    say(f"  ldm train experiment={paper.experiment} data.train=SHARDS", style="bold")
    for stage in paper.requires:
        say(f"  after: ldm train experiment={stage}")
    show_counts(paper, parts)
    show_training(paper)
    show_figures(paper, runs)
    for title, lines in (("contradictions", card.contradictions), ("notes", card.notes)):
        for line in lines:
            say(f"  {title[:-1]}: {line}", style="yellow" if title == "contradictions" else "")


def show_counts(paper: Paper, parts: dict[str, Part]) -> None:
    """Prints parameters and multiply-adds by part, published against built."""
    card = paper.card
    rows = []
    for name, part in parts.items():
        steps = ", ".join(f"{step} {count / PER_BILLION:.1f}" for step, count in part.steps.items())
        rows.append(
            [
                name.replace("_", " "),
                _said(card.parameters.get(name)),
                _million(part.parameters, card.parameters.get(name))
                + (f" + codebook {part.codebook / PER_MILLION:.2f}" if part.codebook else ""),
                _said(card.multiply_adds.get(name)),
                f"{(part.multiply_adds or 0) / PER_BILLION:.2f}" + (f" ({steps})" if steps else ""),
                _because(card, f"parameters.{name}", f"multiply_adds.{name}"),
            ]
        )
    total = f"total ({' + '.join(card.total_of).replace('_', ' ')})"
    built = _million(paper.total(parts), card.parameters.get("total"))
    rows.append([total, _said(card.parameters.get("total")), built, "", "", _because(card, "parameters.total")])
    _table(["million parameters", "published", "built", "10^9 multiply-adds: published", "built", "why"], rows)


def show_training(paper: Paper) -> None:
    """Prints batch size, learning rate with its rule, and steps."""
    said, built = paper.card.training, paper.training
    rows = [
        [name, _number(said.get(name)), _number(built[name]), _because(paper.card, f"training.{name}")]
        for name in ("batch_size", "lr", "steps")
    ]
    rows[1][3] = "; ".join(filter(None, [str(said.get("lr_rule", "")), rows[1][3]]))
    _table(["training", "published", "built", ""], rows)


def show_figures(paper: Paper, runs: Path) -> None:
    """Prints the published rows, and beside each the runs that were measured."""
    from ldm.generation.report import EvaluationFolder, compare

    cards = [paper.card, *(paper.card.row(name) for name in paper.card.rows)]
    rows = [
        [
            card.name if card is not paper.card else card.table,
            ", ".join(f"{name} {value:g}" for name, value in card.published.items()) or "–",
            ", ".join(f"{name} {value}" for name, value in _flat(card.protocol)),
        ]
        for card in cards
    ]
    _table(["row", "published", "protocol"], rows)
    found = evaluations_of(paper, runs)
    if not found:
        say(f"  measured: nothing yet under {runs}; ldm reproduce {paper.experiment.rpartition('/')[2]}", style="dim")
    for folder in found:
        with user_mistakes():
            evaluation = EvaluationFolder(folder)
        tell_card(compare(nearest(cards, evaluation), evaluation))


def nearest(cards: Sequence[Card], evaluation: Any) -> Card:
    """The row whose protocol an evaluation differs from least."""
    from ldm.generation.report import compare

    return min(cards, key=lambda card: len(compare(card, evaluation).differences))


def _flat(node: dict[str, Any] | Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, head in enumerate(heads):
        numbers = place and head not in ("title", "published", "protocol", "why", "")
        table.add_column(head, justify="right" if numbers else "left", overflow="fold", no_wrap=not place)
    for row in rows:
        table.add_row(*row)
    show(table)


def _because(card: Card, *names: str) -> str:
    return "; ".join(str(card.differences[name]["because"]) for name in names if name in card.differences)


def _said(printed: float | str | None) -> str:
    return "–" if printed is None else str(printed)


def _million(count: int, printed: float | str | None) -> str:
    """A count in millions, to two digits, or more where more are printed."""
    text = f"{count / PER_MILLION:.2f}"
    exact = "" if printed is None or as_printed(count / PER_MILLION, printed) == str(printed) else " (differs)"
    return text + exact


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{int(value):,}" if float(value) == int(value) else f"{value:g}"
