"""Curves of a sweep: figures against what was varied, and one figure against another."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.generation.report.cards import same
from ldm.generation.report.reading import EvaluationFolder
from ldm.pages.chart import Chart, Point, Series

# What a sweep may vary: where it stands in the protocol, what it is called, and what stands for none.
AXES: tuple[tuple[str, str, Any], ...] = (
    ("guidance.scale", "guidance scale", 1.0),
    ("steps", "steps", None),
    ("ema.sigma_rel", "EMA length (sigma_rel)", None),
    ("checkpoint.step", "training step", None),
    ("sampler.name", "sampler", None),
    ("discretization.name", "discretization", None),
    ("guidance.rescale", "guidance rescale", 0.0),
    ("guidance.interval", "guidance interval", None),
    ("sampler.eta", "eta", None),
    ("num_samples", "samples", None),
    ("ema", "EMA", None),
)
# Figures that are drawn against each other where both are there: fidelity down, what was asked for across.
PAIRS = (("fid", "clip_score"), ("fid", "inception_score"), ("fd_dinov2", "clip_score"), ("precision", "recall"))
NAMES = {
    "fid": "FID",
    "clip_score": "CLIP score",
    "inception_score": "inception score",
    "kid": "KID",
    "cmmd": "CMMD",
    "fd_dinov2": "FD-DINOv2",
    "sfid": "sFID",
    "clean_fid": "clean-FID",
}
MAX_CHARTS = 24


@dataclass(frozen=True)
class Axis:
    """Something that a sweep varied.

    Args:
        label: what it is called.
        values: one of each evaluation.
    """

    label: str
    values: Sequence[Any]

    @property
    def is_number(self) -> bool:
        """Whether it can be an axis of a chart as it is."""
        return all(isinstance(value, int | float) and math.isfinite(value) for value in self.values)


@dataclass(frozen=True)
class Curve:
    """A chart and the name of its files."""

    name: str
    chart: Chart


def varied(evaluations: Sequence[EvaluationFolder]) -> list[Axis]:
    """What differs between the evaluations, in the order of AXES."""
    axes = []
    for place, label, missing in AXES:
        values = [_at(evaluation.protocol, place, missing) for evaluation in evaluations]
        if isinstance(values[0], dict) or all(same(value, values[0]) for value in values):
            continue
        axes.append(Axis(label, [str(v) if isinstance(v, list) else v for v in values]))
    return axes


def curves(evaluations: Sequence[EvaluationFolder]) -> list[Curve]:
    """Every main figure against each thing that was varied, after the pairs of figures, guidance beside the points."""
    if len(evaluations) < 2:
        return []
    axes = varied(evaluations)
    found: list[Curve] = []
    if axes:
        for down, across in PAIRS:
            found += _trade_off(evaluations, axes, down=down, across=across)
    for axis in axes:
        for name in main_figures(evaluations):
            found += _against(evaluations, axes, axis, name)
    return found[:MAX_CHARTS]


def main_figures(evaluations: Sequence[EvaluationFolder]) -> list[str]:
    """The names of the metrics that every evaluation has a number for, FID and CLIP score first."""
    names = [name for name in evaluations[0].metrics if all(_finite(one.figure(name)) for one in evaluations)]
    return sorted(names, key=lambda name: list(NAMES).index(name) if name in NAMES else len(NAMES))


def write_curves(found: Iterable[Curve], folder: Path) -> list[Path]:
    """Writes each chart as NAME.svg and NAME.png, and all numbers as curves.json; returns the SVG files."""
    folder.mkdir(parents=True, exist_ok=True)
    written, numbers = [], {}
    for curve in found:
        path = folder / f"{curve.name}.svg"
        path.write_text(curve.chart.svg(alone=True))
        path.with_suffix(".png").write_bytes(curve.chart.png())
        written.append(path)
        numbers[curve.name] = _as_json(curve.chart)
    (folder / "curves.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return written


def _as_json(chart: Chart) -> dict[str, Any]:
    lines = {
        series.name: [
            {"x": chart.x_names[int(p.x)] if chart.x_names else p.x, "y": p.y, "label": p.label} for p in series.points
        ]
        for series in chart.series
    }
    return {"x": chart.x_label, "y": chart.y_label, "series": lines}


def _trade_off(evaluations: Sequence[EvaluationFolder], axes: Sequence[Axis], *, down: str, across: str) -> list[Curve]:
    """One figure against another, along the first axis, a line for each setting of the others."""
    along, *others = axes
    groups: dict[str, list[tuple[Any, Point]]] = {}
    for row, evaluation in enumerate(evaluations):
        x, y = evaluation.figure(across), evaluation.figure(down)
        if x is None or y is None or not (math.isfinite(x) and math.isfinite(y)):
            continue
        value = along.values[row]
        groups.setdefault(_setting(others, row), []).append((value, Point(x, y, label=_short(value))))
    if sum(map(len, groups.values())) < 2:
        return []
    lines = sorted(groups.items(), key=_natural)
    series = [Series(name, [point for _, point in sorted(rows, key=_first)]) for name, rows in lines]
    title = f"{called(down)} against {called(across)}, {along.label} beside the points"
    return [Curve(f"{down}_{across}", Chart(title, called(across), called(down), series))]


def _against(evaluations: Sequence[EvaluationFolder], axes: Sequence[Axis], axis: Axis, name: str) -> list[Curve]:
    """A figure against one axis, a line for each setting of the others."""
    others = [other for other in axes if other is not axis]
    names = () if axis.is_number else tuple(dict.fromkeys(_short(value) for value in axis.values))
    groups: dict[str, list[Point]] = {}
    for row, evaluation in enumerate(evaluations):
        x = names.index(_short(axis.values[row])) if names else float(axis.values[row])
        value, interval = evaluation.figure(name), _interval(evaluation, name)
        assert value is not None
        groups.setdefault(_setting(others, row), []).append(Point(x, value, interval=interval))
    lines = sorted(groups.items(), key=_natural)
    series = [Series(setting, sorted(points, key=lambda point: point.x)) for setting, points in lines]
    title = f"{called(name)} against {axis.label}"
    slug = "".join(sign if sign.isalnum() else "_" for sign in axis.label.lower()).strip("_")
    return [Curve(f"{name}_{slug}", Chart(title, axis.label, called(name), series, names))]


def _interval(evaluation: EvaluationFolder, name: str) -> tuple[float, float] | None:
    """One standard deviation to both sides, where the metric tells it as NAME_std or std."""
    metric = evaluation.metrics[name]
    values = metric.get("values") or {}
    wide = values.get(f"{name}_std", values.get("std"))
    return None if not _finite(wide) else (metric["value"] - wide, metric["value"] + wide)


def _setting(axes: Sequence[Axis], row: int) -> str:
    told = [(axis, _short(axis.values[row])) for axis in axes]
    return ", ".join(value if not axis.is_number else f"{axis.label} {value}" for axis, value in told) or "all"


def _at(protocol: Any, place: str, missing: Any) -> Any:
    for part in place.split("."):
        protocol = protocol.get(part) if isinstance(protocol, dict) else None
    return missing if protocol is None else protocol


def called(name: str) -> str:
    """A metric as people write it."""
    return NAMES.get(name, name.replace("_", " "))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)


def _first(row: tuple[Any, Point]) -> tuple[bool, Any]:
    value = row[0]
    return (False, value) if isinstance(value, int | float) else (True, str(value))


def _natural(line: tuple[str, Any]) -> list[tuple[bool, Any]]:
    """The name of a line in an order in which 4 comes before 12."""
    parts = re.split(r"(\d+(?:\.\d+)?)", line[0])
    return [(place % 2 == 0, float(part) if place % 2 else part) for place, part in enumerate(parts)]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
