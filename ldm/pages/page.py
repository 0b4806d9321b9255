"""A page of plots in one file: HTML with inline SVG, nothing loaded from anywhere, all text escaped."""

import base64
import hashlib
from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a2e; --paper: #fff; --soft: #667; --bar: #4a6fa5; --line: #ccd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8f0; --paper: #16161f; --soft: #99a; --bar: #7ea6dd; --line: #334; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
  vertical-align: top; } td:last-child { overflow-wrap: anywhere; min-width: 4rem; max-width: 20rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; } .note { color: var(--soft); }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; } figcaption { color: var(--soft); }
svg rect { fill: var(--bar); } svg text { fill: var(--soft); font-size: 11px; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .8rem; }
.sheet img { max-width: 100%; display: block; } .sheet figcaption { font-size: .75rem; line-height: 1.3;
  overflow-wrap: anywhere; }
"""
# Nothing may be fetched and nothing run, whatever a caption holds.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
WIDTH, HEIGHT, MARGIN = 340, 150, 18


def page(title: str, sections: Sequence[tuple[str, str]], *, style: str = "", script: str = "") -> str:
    """Return a whole page of (heading, HTML) sections; the headings and the title are text.

    `style` comes after the page's own; of all scripts only this one runs.
    """
    body = "\n".join(f"<section><h2>{escape(heading)}</h2>\n{content}</section>" for heading, content in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_policy(script))}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}\n{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def _policy(script: str) -> str:
    """What the browser may do: run this script alone, which it knows by its hash."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"{POLICY}; script-src 'sha256-{digest}'" if script else POLICY


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table; numbers stand right, all cells are text."""
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>\n"


def paragraph(text: str) -> str:
    """Return a note."""
    return f'<p class="note">{escape(text)}</p>\n'


def plots(figures: Sequence[str]) -> str:
    """Return figures side by side."""
    return f'<div class="plots">{"".join(figures)}</div>\n'


def histogram(title: str, edges: Sequence[float], counts: Sequence[int]) -> str:
    """Return a figure with a bar for each interval between two edges; `counts` has one fewer than `edges`."""
    highest, step = max([*counts, 1]), WIDTH / max(len(counts), 1)
    bars = []
    for place, count in enumerate(counts):
        tall = (HEIGHT - MARGIN) * count / highest
        tip = f"{number(edges[place])} to {number(edges[place + 1])}: {count}"
        bars.append(
            f'<rect x="{place * step:.1f}" y="{HEIGHT - MARGIN - tall:.1f}" width="{max(step - 1, 0.5):.1f}" '
            f'height="{tall:.1f}"><title>{escape(tip)}</title></rect>'
        )
    # Bars of whole numbers reach half a one to either side.
    half = 0.5 if edges[0] % 1 == edges[-1] % 1 == 0.5 else 0.0
    labels = (
        f'<text x="0" y="{HEIGHT - 4}">{escape(number(edges[0] + half))}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT - 4}" text-anchor="end">{escape(number(edges[-1] - half))}</text>'
        f'<text x="{WIDTH}" y="10" text-anchor="end">{highest}</text>'
    )
    return _figure(title, HEIGHT, "".join(bars) + labels)


def bars(title: str, labels: Sequence[str], counts: Sequence[int]) -> str:
    """Return a figure with a lying bar for each label."""
    highest, tall = max([*counts, 1]), 18
    parts = []
    for place, (label, count) in enumerate(zip(labels, counts, strict=True)):
        y = place * tall
        parts.append(
            f'<rect x="130" y="{y + 3}" width="{(WIDTH - 180) * count / highest:.1f}" height="12"></rect>'
            f'<text x="125" y="{y + 13}" text-anchor="end">{escape(_shortened(label))}</text>'
            f'<text x="{135 + (WIDTH - 180) * count / highest:.1f}" y="{y + 13}">{count}</text>'
        )
    return _figure(title, max(tall * len(counts), tall), "".join(parts))


def contact_sheet(pictures: Sequence[tuple[str, str]]) -> str:
    """Return pictures, (JPEG in base64, text), in a grid."""
    cells = [
        f'<figure><img alt="" src="data:image/jpeg;base64,{escape(jpeg)}"><figcaption>{escape(text)}</figcaption>'
        "</figure>"
        for jpeg, text in pictures
    ]
    return f'<div class="sheet">{"".join(cells)}</div>\n'


def number(value: float) -> str:
    """Return a number as people write it."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3g}"


def _figure(title: str, height: int, content: str) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg role="img" aria-label="{escape(title)}" '
        f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">{content}</svg></figure>'
    )


def _cell(value: object) -> str:
    if isinstance(value, int | float):
        return f'<td class="number">{escape(number(value))}</td>'
    return f"<td>{escape(str(value))}</td>"


def _shortened(label: str) -> str:
    return (label if len(label) <= 20 else f"{label[:19]}…") or "(empty)"
