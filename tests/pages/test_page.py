import re
from html.parser import HTMLParser

import pytest

from ldm.pages.page import histogram, page, paragraph, table

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


class Reader(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_bars_are_as_tall_as_their_counts() -> None:
    heights = [
        float(text) for text in re.findall(r'height="([\d.]+)"><title>', histogram("x", [0, 1, 2, 3], [1, 4, 2]))
    ]
    assert heights[1] == pytest.approx(2 * heights[2]) == pytest.approx(4 * heights[0])


def test_all_text_on_a_page_is_escaped() -> None:
    content = page(EVIL, [(EVIL, paragraph(EVIL) + table([EVIL], [[EVIL, 3]]) + histogram(EVIL, [0, 1], [1]))])
    reader = Reader()
    reader.feed(content)
    assert not {"script", "img"} & reader.tags
    # Twice as the title, then heading, note, two cells and a caption.
    assert reader.text.count(EVIL) == 7


def test_a_script_runs_by_its_hash_alone() -> None:
    assert "script-src" not in page("t", [])
    assert "script-src &#x27;sha256-" in page("t", [], script="let x = 1;")
