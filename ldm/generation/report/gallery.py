"""Pictures and tables on a report's page: small, inside the file, and with words for those who cannot see them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from ldm.pages.page import number

# Pixels of the longer side of a picture on a page; smaller ones are kept as they are.
SIDE = 192
# Up to this side a picture is kept without loss, as blocks of WebP would show.
LOSSLESS_UP_TO = 64
STYLE = """
table { display: block; overflow-x: auto; max-width: 100%; }
td.differs { background: color-mix(in srgb, #e0a000 22%, transparent); } td, th { max-width: 22rem;
  overflow-wrap: break-word; } thead th { vertical-align: bottom; }
.pictures { display: grid; gap: .9rem .7rem; align-items: start; justify-content: start; overflow-x: auto; }
.pictures figure, .sheet figure { min-width: 0; } .pictures img, .sheet img, .wide img { max-width: 100%; height: auto;
  display: block; border-radius: 3px; } img.small { width: 100%; image-rendering: pixelated; }
.pictures figcaption, .sheet figcaption { font-size: .75rem; line-height: 1.3; overflow-wrap: anywhere; }
.pictures .head { font-weight: 600; font-size: .85rem; overflow-wrap: anywhere; }
.pictures .words { font-size: .85rem; overflow-wrap: anywhere; } .wide { margin: 0 0 1rem; }
summary { cursor: pointer; font-weight: 600; margin: 1rem 0 .4rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.6rem 0 .6rem; } svg.chart { max-width: 100%; height: auto; }
.plots > figure { min-width: min(20rem, 100%); max-width: max(20rem, calc(50% - .8rem)); }
"""


def embedded(picture: Image.Image, *, side: int = SIDE) -> tuple[str, int, int]:
    """(data URI, width, height) of a picture, scaled down to `side` pixels at most."""
    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, format="WEBP", quality=80, method=4, lossless=max(small.size) <= LOSSLESS_UP_TO)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}", small.width, small.height


def image(picture: Image.Image, alt: str, *, side: int = SIDE) -> str:
    """A picture with words in its place."""
    uri, width, height = embedded(picture, side=side)
    kind = ' class="small"' if max(width, height) <= LOSSLESS_UP_TO else ""
    return f'<img{kind} src="{uri}" alt="{escape(alt)}" width="{width}" height="{height}" loading="lazy">'


def figure(picture: Image.Image, alt: str, caption: str = "") -> str:
    """A picture above its caption."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{image(picture, alt)}{below}</figure>"


def wide(picture: Image.Image, alt: str, caption: str) -> str:
    """A picture as wide as the page, below its caption."""
    shown = image(picture, alt, side=max(picture.size))
    return f'<figure class="wide"><figcaption>{escape(caption)}</figcaption>{shown}</figure>\n'


def sheet(figures: Sequence[str]) -> str:
    """Figures in as many columns as fit."""
    return f'<div class="sheet">{"".join(figures)}</div>\n'


def aligned(heads: Sequence[str], rows: Sequence[Sequence[str]], *, first: str = "minmax(6rem, 13rem)") -> str:
    """Rows of HTML cells below headings, which are text; the first column holds words."""
    columns = f"{first} repeat({len(heads) - 1}, minmax(4rem, 8.5rem))"
    top = "".join(f'<div class="head">{escape(head)}</div>' for head in heads)
    cells = "".join(cell for row in rows for cell in row)
    return f'<div class="pictures" style="grid-template-columns: {columns}">{top}{cells}</div>\n'


def words(text: str) -> str:
    """A cell of `aligned` that holds text."""
    return f'<div class="words">{escape(text)}</div>'


def heading(text: str) -> str:
    """A heading within a section."""
    return f"<h3>{escape(text)}</h3>\n"


def folded(summary: str, content: str, *, is_open: bool) -> str:
    """A part that can be folded away."""
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>\n{content}</details>\n"


def differing_table(headers: Sequence[str], rows: Sequence[tuple[Sequence[object], bool]]) -> str:
    """A table in which rows that differ are marked, by a sign and a colour.

    Args:
        rows: (cells, whether it differs); the first cell names the row.
    """
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in headers)
    body = "\n".join(f"<tr>{_row(cells, differs=differs)}</tr>" for cells, differs in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>\n"


def _row(cells: Sequence[object], *, differs: bool) -> str:
    sign = '<span title="not the same everywhere">≠ </span>' if differs else ""
    kinds = ["differs"] if differs else []
    parts = [f'<th scope="row">{sign}{escape(str(cells[0]))}</th>']
    for cell in cells[1:]:
        is_number = isinstance(cell, int | float) and not isinstance(cell, bool)
        names = " ".join([*kinds, *(["number"] if is_number else [])])
        parts.append(f"<td{f' class={chr(34)}{names}{chr(34)}' if names else ''}>{escape(said(cell))}</td>")
    return "".join(parts)


def said(value: object) -> str:
    """A value as a table shows it."""
    if value is None or value in ([], ()):
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else number(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(said, value))
    return str(value)
