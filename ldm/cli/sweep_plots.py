"""A sweep on one page: history, parallel coordinates and importance as SVG, and a table; no script, no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ldm.cli.sweep_space import Choice, Parameter
from ldm.cli.sweep_study import Study

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# Sizes in pixels: of a plot, and of the margin around its axes.
WIDTH, HEIGHT, MARGIN = 860, 300, 60
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em; color: #222 }
svg { width: 100%; height: auto } svg text { font-size: 12px; fill: #444 }
table { border-collapse: collapse; font-size: 13px } td, th { padding: 2px 10px 2px 0; text-align: left }
.finished { fill: #2868b0 } .pruned { fill: #b0b0b0 } .diverged, .failed { fill: #c03020 }
.axis { stroke: #999 } .best { stroke: #e08020; fill: none; stroke-width: 2 }
"""


def page(study: Study, *, objective: str, shares: Mapping[str, float]) -> str:
    """The whole page.

    Args:
        study: what is shown.
        objective: its name.
        shares: importance by key; empty leaves the plot out.
    """
    finished = study.finished
    parts = [f"<h1>Sweep for {escape(objective)}</h1>", _summary(study, objective)]
    if finished:
        parts += ["<h2>History</h2>", history(study.trials, objective, minimize=_minimizes(study))]
        parts += ["<h2>Parallel coordinates</h2>", parallel(finished, study.parameters, objective, study=study)]
    if shares:
        parts += ["<h2>Importance</h2>", importance(shares)]
    parts += ["<h2>Trials</h2>", _table(study)]
    head = f'<meta charset="utf-8"><title>Sweep for {escape(objective)}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def history(trials: Sequence[FrozenTrial], objective: str, *, minimize: bool) -> str:
    """Each trial's value by number, and the best so far."""
    points = [(trial, trial.value) for trial in trials if trial.value is not None and math.isfinite(trial.value)]
    values = [value for _, value in points]
    across = _scale(0, max(len(trials) - 1, 1), MARGIN, WIDTH - MARGIN)
    up = _scale(min(values), max(values), HEIGHT - MARGIN / 2, MARGIN / 2)
    marks: list[str] = []
    line: list[str] = []
    best = math.inf if minimize else -math.inf
    for trial, value in points:
        kind = str(trial.user_attrs.get("outcome", "pruned"))
        x, y = across(trial.number), up(value)
        tip = escape(f"trial {trial.number}, {kind}: {value:.6g}")
        marks.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{tip}</title></circle>')
        if kind == "finished":
            new = min(best, value) if minimize else max(best, value)
            line += [f"{x:.1f},{up(best):.1f}"] if line else []
            line.append(f"{x:.1f},{up(new):.1f}")
            best = new
    lowest, highest = min(values), max(values)
    axes = _axis(MARGIN, [(up(value), f"{value:.4g}") for value in {lowest: 0, highest: 0}])
    label = _text(WIDTH / 2, HEIGHT - 4, f"trial (0 to {len(trials) - 1}); the line is the best {objective} so far")
    return _svg(HEIGHT, [axes, f'<polyline class="best" points="{" ".join(line)}"/>', *marks, label])


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
    return _svg(HEIGHT, [*lines, *axes, *labels])


def importance(shares: Mapping[str, float]) -> str:
    """One bar a parameter."""
    height, bars = 26, []
    for row, (key, share) in enumerate(sorted(shares.items(), key=lambda item: -item[1])):
        top, length = row * height, max(share, 0.002) * (WIDTH - 340)
        bars.append(f'<rect class="finished" x="260" y="{top + 5}" width="{length:.1f}" height="{height - 10}"/>')
        bars.append(_text(250, top + 18, key, anchor="end"))
        bars.append(_text(270 + length, top + 18, f"{share:.0%}", anchor="start"))
    return _svg(height * len(shares), bars)


def _summary(study: Study, objective: str) -> str:
    best = study.best()
    if best is None:
        return f"<p>{len(study.trials)} trials, none finished.</p>"
    settings = ", ".join(f"{key} = {value}" for key, value in best.params.items())
    return (
        f"<p>{len(study.trials)} trials, {len(study.finished)} finished. "
        f"Best: trial {best.number}, {escape(objective)} {best.value:.6g} with {escape(settings)}.</p>"
    )


def _table(study: Study) -> str:
    keys = [parameter.key for parameter in study.parameters]
    rows = [["trial", "outcome", "value", *keys, "reason"]]
    for trial in study.trials:
        said = trial.user_attrs
        value = "" if trial.value is None else f"{trial.value:.6g}"
        drawn = [str(trial.params.get(key, "")) for key in keys]
        rows.append([str(trial.number), said.get("outcome", "unfinished"), value, *drawn, said.get("reason", "")])
    kinds = ["th", *["td"] * (len(rows) - 1)]
    lines = [
        "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row) + "</tr>"
        for kind, row in zip(kinds, rows, strict=True)
    ]
    return f"<table>{''.join(lines)}</table>"


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


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'


def _scale(low: float, high: float, start: float, end: float) -> Any:
    """A linear map; everything goes to the middle where low = high."""

    def place(value: float) -> float:
        return (start + end) / 2 if high == low else start + (value - low) / (high - low) * (end - start)

    return place


def _minimizes(study: Study) -> bool:
    return study.study.direction.name == "MINIMIZE"
