"""Line charts: as SVG that follows a page's colours, and as PNG for papers and slides, from the same marks."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Literal

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont
    from PIL.ImageFont import ImageFont as BitmapFont

Place = tuple[float, float]
# Pixels: of a chart, and of the margins left, top, right and below its axes.
WIDTH, HEIGHT = 520, 340
LEFT, TOP, RIGHT, BELOW = 66, 52, 18, 52
# Of one series after the other, told apart by people with any colour vision (Okabe & Ito 2008); dark: on dark paper.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9")
COLOURS_ON_DARK = ("#56b4e9", "#f0904d", "#3cc79b", "#e3a5c7", "#f0e442", "#9fd3f2")
# From this ratio on an axis of positive numbers is logarithmic.
LOG_FROM = 12.0
# PNGs are drawn at this many pixels a unit.
SCALE = 2
STYLE = "\n".join(
    [
        ".chart text { font: 12px system-ui, sans-serif; fill: var(--soft); stroke: var(--paper); stroke-width: 3px;",
        "  paint-order: stroke; } .chart .name { fill: var(--ink); font-weight: 600; }",
        ".chart .axis { stroke: var(--line); } .chart polyline { fill: none; stroke-width: 2; }",
        *(f".chart .s{i} {{ stroke: {c}; }} .chart .f{i} {{ fill: {c}; }}" for i, c in enumerate(COLOURS)),
        "@media (prefers-color-scheme: dark) {",
        *(f"  .chart .s{i} {{ stroke: {c}; }} .chart .f{i} {{ fill: {c}; }}" for i, c in enumerate(COLOURS_ON_DARK)),
        "}",
    ]
)
_ALONE = ":root { --ink: #1a1a2e; --soft: #556; --line: #ccd; --paper: #fff; }\n" + STYLE.partition("@media")[0]


@dataclass(frozen=True)
class Point:
    """One measurement.

    Args:
        x, y: numbers; finite.
        label: written beside it, such as the guidance scale.
        interval: of y, or None.
    """

    x: float
    y: float
    label: str = ""
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """Points that a line joins, in this order; dots alone where it is no line."""

    name: str
    points: Sequence[Point]
    is_line: bool = True


@dataclass(frozen=True)
class _Line:
    places: Sequence[Place]
    series: int | None = None


@dataclass(frozen=True)
class _Dot:
    place: Place
    series: int
    tip: str


@dataclass(frozen=True)
class _Text:
    place: Place
    words: str
    anchor: Literal["start", "middle", "end"] = "middle"
    strong: bool = False


@dataclass(frozen=True)
class Chart:
    """A title, two axes and lines.

    Args:
        x_names: what stands at x = 0, 1, ..., where x counts names instead of measuring.

    Raises:
        ValueError: no point at all, or one that is not finite.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_names: Sequence[str] = ()
    _marks: list[_Line | _Dot | _Text] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        points = [point for series in self.series for point in series.points]
        if not points or not all(math.isfinite(point.x) and math.isfinite(point.y) for point in points):
            raise ValueError(f"{self.title}: got points {points}, expected at least one, all of finite numbers")
        ys = [y for point in points for y in (point.y, *(point.interval or ()))]
        across = _Axis.of([point.x for point in points], LEFT, WIDTH - RIGHT, counts=bool(self.x_names))
        up = _Axis.of(ys, HEIGHT - BELOW, TOP)
        self._marks.extend(self._frame(across, up))
        for number, series in enumerate(self.series):
            self._marks.extend(_of_series(series, number % len(COLOURS), across, up))
        if len(self.series) > 1:
            self._marks.extend(self._legend())

    def svg(self, *, alone: bool = False) -> str:
        """The chart for a page; alone: as a file of its own, on white."""
        width, height = self.size
        body = "".join(_as_svg(mark) for mark in self._marks)
        head = f'<style>{_ALONE}</style><rect width="{width}" height="{height}" fill="#fff"/>' if alone else ""
        space = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
        return (
            f'<svg{space} class="chart" role="img" aria-label="{escape(self.spoken)}" width="{width}" '
            f'height="{height}" viewBox="0 0 {width} {height}">{head}{body}</svg>'
        )

    def png(self) -> bytes:
        """The chart as a PNG file's bytes, on white, at twice its size."""
        picture = Image.new("RGB", (self.size[0] * SCALE, self.size[1] * SCALE), "white")
        draw = ImageDraw.Draw(picture)
        font = ImageFont.load_default(12 * SCALE)
        for mark in self._marks:
            _paint(draw, mark, font)
        stream = io.BytesIO()
        picture.save(stream, format="PNG", optimize=True)
        return stream.getvalue()

    @property
    def spoken(self) -> str:
        """What the chart shows, in words and numbers, for those who cannot see it."""
        lines = [
            f"{series.name}: " + ", ".join(_tip(point, self.x_names) for point in series.points)
            for series in self.series
        ]
        return f"{self.title}. {self.y_label} against {self.x_label}. {'; '.join(lines)}"

    def _frame(self, across: _Axis, up: _Axis) -> list[_Line | _Text]:
        bottom, right = HEIGHT - BELOW, WIDTH - RIGHT
        marks: list[_Line | _Text] = [
            _Line([(LEFT, TOP), (LEFT, bottom), (right, bottom)]),
            _Text((8, 18), self.title, "start", strong=True),
            _Text(((LEFT + right) / 2, HEIGHT - 10), self.x_label),
            _Text((8, 38), self.y_label, "start"),
        ]
        for value, text in zip(up.ticks, told_apart(up.ticks), strict=True):
            y = up(value)
            marks += [_Line([(LEFT, y), (right, y)]), _Text((LEFT - 6, y + 4), text, "end")]
        ticks = list(zip(across.ticks, told_apart(across.ticks), strict=True))
        names = [(float(place), name) for place, name in enumerate(self.x_names)] or ticks
        return marks + [_Text((across(value), bottom + 18), name) for value, name in names]

    def _legend(self) -> list[_Dot | _Text]:
        marks: list[_Dot | _Text] = []
        for number, series in enumerate(self.series):
            y = TOP + 12 + 18 * number
            marks.append(_Dot((WIDTH + 4, y), number % len(COLOURS), series.name))
            marks.append(_Text((WIDTH + 14, y + 4), series.name, "start"))
        return marks

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels; names of several lines stand on the right, and below each other."""
        if len(self.series) < 2:
            return WIDTH, HEIGHT
        longest = max(len(series.name) for series in self.series)
        return WIDTH + 24 + 7 * longest, max(HEIGHT, TOP + 24 + 18 * len(self.series))


@dataclass(frozen=True)
class _Axis:
    """A map from values to pixels, linear or logarithmic, with a little room at both ends."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float, *, counts: bool = False) -> _Axis:
        low, high = min(values), max(values)
        log = not counts and low > 0 and high / low >= LOG_FROM
        seen: Callable[[float], float] = math.log if log else float
        room = 0.06 * (seen(high) - seen(low)) or abs(seen(low)) * 0.1 or 1.0
        first, last = seen(low) - room, seen(high) + room
        least = 1.0 if all(float(value).is_integer() for value in values) else 0.0
        ticks = _log_ticks(low, high) if log else _ticks(first, last, least=least)
        return cls(first, last, start, end, log, tuple(ticks))

    def __call__(self, value: float) -> float:
        seen = math.log(value) if self.log else value
        return self.start + (seen - self.low) / (self.high - self.low) * (self.end - self.start)


def short(value: float) -> str:
    """A number as a tick shows it."""
    return f"{value:.4g}"


def told_apart(values: Sequence[float]) -> list[str]:
    """Numbers as ticks show them, with as many digits as tell them apart."""
    for digits in range(4, 13):
        texts = [f"{value:.{digits}g}" for value in values]
        if len(set(texts)) == len(texts):
            break
    return texts


def _ticks(low: float, high: float, *, least: float = 0.0) -> list[float]:
    """Round numbers 1, 2 or 5 times a power of ten apart, some five of them; `least` apart at least."""
    raw = max((high - low) / 5, least)
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; over three decades the powers alone."""
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [f * 10.0**p for p in powers for f in factors if low * 0.94 <= f * 10.0**p <= high * 1.06]


def _of_series(series: Series, number: int, across: _Axis, up: _Axis) -> list[_Line | _Dot | _Text]:
    places = [(across(point.x), up(point.y)) for point in series.points]
    marks: list[_Line | _Dot | _Text] = [_Line(places, number)] if series.is_line and len(places) > 1 else []
    for place, point in zip(places, series.points, strict=True):
        if point.interval:
            marks.append(_Line([(place[0], up(end)) for end in point.interval], number))
        marks.append(_Dot(place, number, f"{series.name}: {_tip(point, ())}"))
        if point.label:
            marks.append(_Text((place[0] + 7, place[1] - 6), point.label, "start"))
    return marks


def _tip(point: Point, names: Sequence[str]) -> str:
    x = names[int(point.x)] if names else short(point.x)
    label = f" ({point.label})" if point.label else ""
    return f"{x} {short(point.y)}{label}"


def _as_svg(mark: _Line | _Dot | _Text) -> str:
    if isinstance(mark, _Line):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.places)
        kind = "axis" if mark.series is None else f"s{mark.series}"
        return f'<polyline class="{kind}" fill="none" points="{points}"/>'
    x, y = mark.place
    if isinstance(mark, _Dot):
        return (
            f'<circle class="f{mark.series}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(mark.tip)}</title></circle>'
        )
    kind = ' class="name"' if mark.strong else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{mark.anchor}">{escape(mark.words)}</text>'


def _paint(draw: ImageDraw.ImageDraw, mark: _Line | _Dot | _Text, font: FreeTypeFont | BitmapFont) -> None:
    if isinstance(mark, _Line):
        colour, width = ("#ccccdd", 1) if mark.series is None else (COLOURS[mark.series], 2)
        draw.line([(x * SCALE, y * SCALE) for x, y in mark.places], fill=colour, width=width * SCALE, joint="curve")
        return
    x, y = (value * SCALE for value in mark.place)
    if isinstance(mark, _Dot):
        draw.circle((x, y), 4 * SCALE, fill=COLOURS[mark.series])
        return
    anchor = {"start": "ls", "middle": "ms", "end": "rs"}[mark.anchor]
    ink = "#1a1a2e" if mark.strong else "#555566"
    draw.text((x, y), mark.words, fill=ink, font=font, anchor=anchor, stroke_width=SCALE, stroke_fill="white")
