"""A sweep as one page: history, parallel coordinates, importance and a table; no script, no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ldm.cli.sweep_space import Choice, Parameter
from ldm.cli.sweep_study import Study
from ldm.pages.chart import STYLE, Chart, Point, Series
from ldm.pages.page import bars, page, paragraph, plots, table

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# Pixels of the parallel coordinates, and of the margin around their axes.
WIDTH, HEIGHT, MARGIN = 860, 300, 60
OWN_STYLE = "svg.parallel { max-width: 100%; height: auto; } svg.parallel .axis { stroke: var(--line); }\n"


def sweep_page(study: Study, *, objective: str, shares: Mapping[str, float]) -> str:
    """The whole page.

    Args:
        study: what is shown.
        objective: its name.
        shares: importance by key; empty leaves the plot out.
    """
    finished = study.finished
    sections = [("Result", paragraph(_summary(study, objective)))]
    if finished:
        chart = history(study.trials, objective, minimize=_minimizes(study))
        sections.append(("History", plots([f"<figure>{chart.svg()}</figure>"])))
        sections.append(("Parallel coordinates", parallel(finished, study.parameters, objective, study=study)))
    if shares:
        ranked = sorted(shares, key=shares.__getitem__, reverse=True)
        percent = [round(100 * shares[key]) for key in ranked]
        sections.append(("Importance", plots([bars(f"share of the spread of {objective}, %", ranked, percent)])))
    sections.append(("Trials", _table(study)))
    return page(f"Sweep for {objective}", sections, style=STYLE + OWN_STYLE)


def history(trials: Sequence[FrozenTrial], objective: str, *, minimize: bool) -> Chart:
    """The best value so far, and each trial's by the way it ended."""
    better = min if minimize else max
    best: list[Point] = []
    by_outcome: dict[str, list[Point]] = {}
    for trial in trials:
        if trial.value is None or not math.isfinite(trial.value):
            continue
        outcome = str(trial.user_attrs.get("outcome", "pruned"))
        by_outcome.setdefault(outcome, []).append(Point(trial.number, trial.value))
        if outcome == "finished":
            before = best[-1].y if best else trial.value
            best.append(Point(trial.number, better(before, trial.value)))
    dots = [Series(outcome, points, is_line=False) for outcome, points in sorted(by_outcome.items())]
    return Chart(f"{objective} of each trial", "trial", objective, [Series("best so far", best), *dots])


def parallel(finished: Sequence[FrozenTrial], parameters: Sequence[Parameter], objective: str, *, study: Study) -> str:
    """One line a finished trial through its settings to its value; the better, the bluer."""
    values = [float(trial.value or 0.0) for trial in finished]
    places = _scale(0, len(parameters), MARGIN, WIDTH - MARGIN)
    up = _scale(min(values), max(values), HEIGHT - MARGIN, MARGIN / 2)
    rank = {number: place for place, number in enumerate(sorted(range(len(values)), key=values.__getitem__))}
    lines = []
    for index, trial in enumerate(finished):
        heights = [_height(parameter, trial.params[parameter.key]) for parameter in parameters] + [up(values[index])]
        points = " ".join(f"{places(place):.1f},{height:.1f}" for place, height in enumerate(heights))
        share = rank[index] / max(len(values) - 1, 1)
        share = share if _minimizes(study) else 1 - share
        colour = f"hsl({210 - 190 * share:.0f} 60% {40 + 30 * share:.0f}%)"
        tip = escape(f"trial {trial.number}: {values[index]:.6g}")
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}"><title>{tip}</title></polyline>')
    ends = [(up(value), f"{value:.4g}") for value in {min(values): 0, max(values): 0}]
    axes = [_axis(places(place), _ticks(parameter)) for place, parameter in enumerate(parameters)]
    axes.append(_axis(places(len(parameters)), ends))
    names = [*(parameter.key for parameter in parameters), objective]
    labels = [_text(places(place), HEIGHT - 20 + 14 * (place % 2), name) for place, name in enumerate(names)]
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    told = escape(f"Settings of {len(finished)} finished trials, and {objective} at the right")
    return f'<svg class="parallel" role="img" aria-label="{told}" {size}>{"".join([*lines, *axes, *labels])}</svg>\n'


def _summary(study: Study, objective: str) -> str:
    best = study.best()
    if best is None:
        return f"{len(study.trials)} trials, none finished."
    settings = ", ".join(f"{key} = {value}" for key, value in best.params.items())
    return (
        f"{len(study.trials)} trials, {len(study.finished)} finished. "
        f"Best: trial {best.number}, {objective} {best.value:.6g} with {settings}."
    )


def _table(study: Study) -> str:
    keys = [parameter.key for parameter in study.parameters]
    rows = []
    for trial in study.trials:
        said = trial.user_attrs
        value = "" if trial.value is None else f"{trial.value:.6g}"
        drawn = [str(trial.params.get(key, "")) for key in keys]
        rows.append([str(trial.number), said.get("outcome", "unfinished"), value, *drawn, said.get("reason", "")])
    return table(["trial", "outcome", "value", *keys, "reason"], rows)


def _height(parameter: Parameter, value: Any) -> float:
    """Where a setting lies on its axis."""
    bottom, top = HEIGHT - MARGIN, MARGIN / 2
    if isinstance(parameter, Choice):
        return _scale(0, max(len(parameter.values) - 1, 1), bottom, top)(parameter.values.index(value))
    if parameter.log:
        return _scale(math.log(parameter.low), math.log(parameter.high), bottom, top)(math.log(value))
    return _scale(parameter.low, parameter.high, bottom, top)(value)


def _ticks(parameter: Parameter) -> list[tuple[float, str]]:
    values = parameter.values if isinstance(parameter, Choice) else (parameter.low, parameter.high)
    return [(_height(parameter, value), f"{value:.4g}" if isinstance(value, float) else str(value)) for value in values]


def _axis(x: float, ticks: Sequence[tuple[float, str]]) -> str:
    heights = [height for height, _ in ticks]
    line = f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{min(heights):.1f}" y2="{max(heights):.1f}"/>'
    return line + "".join(_text(x - 6, height + 4, name, anchor="end") for height, name in ticks)


def _text(x: float, y: float, words: str, *, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """A linear map; everything goes to the middle where low = high."""

    def place(value: float) -> float:
        return (start + end) / 2 if high == low else start + (value - low) / (high - low) * (end - start)

    return place


def _minimizes(study: Study) -> bool:
    return study.study.direction.name == "MINIMIZE"
