"""The tables of a report: figures, protocols, and what a paper published, with whatever differs named and marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ldm.generation.report import gallery
from ldm.generation.report.cards import UNTOLD, Comparison, same
from ldm.generation.report.reading import EvaluationFolder, flattened
from ldm.pages.page import paragraph


def figures(evaluations: Sequence[EvaluationFolder]) -> str:
    """Every figure of every evaluation; a metric that was measured by different protocols is marked."""
    heads = ["", *(one.name for one in evaluations), *(["better"] if _directions(evaluations) else [])]
    rows: list[tuple[Sequence[object], bool]] = []
    unlike = _unlike_metrics(evaluations)
    for name in _figure_names(evaluations):
        metric = name.partition("/")[0]
        cells = [one.figures.get(name) for one in evaluations]
        direction = [_direction(name, evaluations)] if _directions(evaluations) else []
        rows.append(([name, *cells, *direction], metric in unlike))
    notes = [
        f"≠ {metric} was measured differently: {', '.join(settings)}. Such numbers are not comparable."
        for metric, settings in unlike.items()
    ]
    return gallery.differing_table(heads, rows) + "".join(map(paragraph, notes))


def protocols(evaluations: Sequence[EvaluationFolder]) -> str:
    """Every setting of the protocols, those that differ first and marked."""
    flat = [flattened(one.protocol) for one in evaluations]
    both = [{**own, **_own_settings(one, own)} for one, own in zip(evaluations, flat, strict=True)]
    names = list(dict.fromkeys(name for settings in both for name in settings))
    rows: list[tuple[Sequence[object], bool]] = []
    for name in names:
        values = [settings.get(name) for settings in both]
        # Numbers, words and hashes in one column: all as words.
        rows.append(
            (
                [name, *(gallery.said(value) or "–" for value in values)],
                not all(same(value, values[0]) for value in values),
            )
        )
    rows.sort(key=lambda row: not row[1])
    return gallery.differing_table(["setting", *(one.name for one in evaluations)], rows)


def _own_settings(evaluation: EvaluationFolder, common: Mapping[str, Any]) -> dict[str, Any]:
    """What each metric says of itself, without the reference where it is the one of all."""
    told = flattened({name: metric.get("protocol") or {} for name, metric in evaluation.metrics.items()})
    return {
        name: value
        for name, value in told.items()
        if not (name.partition(".")[2].startswith("reference.") and common.get(name.partition(".")[2]) == value)
    }


def by_card(comparisons: Sequence[Comparison]) -> list[list[Comparison]]:
    """The comparisons of each card."""
    cards = [one.card for one in comparisons]
    firsts = [card for place, card in enumerate(cards) if card not in cards[:place]]
    return [[one for one in comparisons if one.card == card] for card in firsts]


def published(comparisons: Sequence[Comparison]) -> str:
    """What a paper says beside what was measured, and each difference between the protocols."""
    card = comparisons[0].card
    link = f' <a href="{escape(card.url)}">{escape(card.url)}</a>' if card.url.startswith("https://") else ""
    head = gallery.heading(card.name) + f'<p class="note">{escape(card.citation)}; {escape(card.table)}.{link}</p>\n'
    names = ["measured"] if len(comparisons) == 1 else [one.name for one in comparisons]
    rows: list[tuple[Sequence[object], bool]] = []
    for place, figure in enumerate(comparisons[0].figures):
        found = [one.figures[place].measured for one in comparisons]
        alone = [figure.difference, _percent(figure.relative)] if len(comparisons) == 1 else []
        rows.append(([figure.name, figure.published, *found, *alone], False))
    more = ["difference", "relative"] if len(comparisons) == 1 else []
    table = gallery.differing_table(["", "published", *names, *more], rows)
    unlike = {one.name: one.published for comparison in comparisons for one in comparison.differences}
    measured = [{one.name: one.measured for one in comparison.differences} for comparison in comparisons]
    settings: list[tuple[Sequence[object], bool]] = [
        ([name, value, *(own.get(name, value) for own in measured)], True) for name, value in unlike.items()
    ]
    agreed = [name for name in comparisons[0].agreeing if all(name in one.agreeing for one in comparisons)]
    notes = [
        f"The same in all: {', '.join(agreed)}." if agreed else "",
        *card.notes,
        *(f"The sources contradict each other: {text}" for text in card.contradictions),
    ]
    unlike_table = gallery.differing_table(["setting", "published", *names], settings) if settings else ""
    return head + table + unlike_table + "".join(paragraph(note) for note in notes if note)


def _figure_names(evaluations: Sequence[EvaluationFolder]) -> list[str]:
    """All figures, those of metrics first."""
    names = list(dict.fromkeys(name for one in evaluations for name in one.figures))
    metrics = {name for one in evaluations for name in one.metrics}
    return sorted(names, key=lambda name: name.partition("/")[0] not in metrics)


def _unlike_metrics(evaluations: Sequence[EvaluationFolder]) -> Mapping[str, list[str]]:
    """Metrics whose own protocols differ, or all of them where samples or the reference do; and in what."""
    everywhere = [_comparable(one.protocol) for one in evaluations]
    common = _differing(everywhere)
    found: dict[str, list[str]] = {}
    for metric in dict.fromkeys(name for one in evaluations for name in one.metrics):
        own = [flattened(one.metrics[metric].get("protocol") or {}) for one in evaluations if metric in one.metrics]
        if differing := [*common, *_differing(own)]:
            found[metric] = differing
    return found


def _comparable(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for figures to be comparable: neither the model nor how it was sampled."""
    reference = protocol.get("reference") or {}
    return {
        "num_samples": protocol.get("num_samples"),
        "image_size": protocol.get("image_size"),
        **{f"reference.{name}": value for name, value in flattened(reference).items() if name in ("sha256", "count")},
        **{
            f"prompts.{name}": value
            for name, value in flattened(protocol.get("prompts") or {}).items()
            if name == "sha256"
        },
    }


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for one in settings for name in one if name not in UNTOLD)
    return [name for name in names if not all(same(one.get(name), settings[0].get(name)) for one in settings)]


def _directions(evaluations: Sequence[EvaluationFolder]) -> bool:
    return any(metric.get("higher_is_better") is not None for one in evaluations for metric in one.metrics.values())


def _direction(figure: str, evaluations: Sequence[EvaluationFolder]) -> str:
    """Whether more is better of a figure; "" for the spread of another, of which neither is."""
    metric, _, part = figure.partition("/")
    if part == "std" or part.endswith(("_std", "_low", "_high")):
        return ""
    values = [one.metrics[metric].get("higher_is_better") for one in evaluations if metric in one.metrics]
    return "" if not values or values[0] is None else "higher" if values[0] else "lower"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:+.1f} %"
