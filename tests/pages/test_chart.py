import io
import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from ldm.pages.chart import Chart, Point, Series


def test_a_chart_is_drawn_in_its_frame_and_told_in_words() -> None:
    chart = Chart("FID & more", "steps", "FID", [Series("a", [Point(5, 30.0), Point(250, 7.5, interval=(7.0, 8.0))])])
    svg = ElementTree.fromstring(chart.svg(alone=True))
    width, height = chart.size
    for circle in svg.iter("{http://www.w3.org/2000/svg}circle"):
        assert 0 < float(circle.get("cx", "")) < width and 0 < float(circle.get("cy", "")) < height
    assert svg.get("aria-label") == "FID & more. FID against steps. a: 5 30, 250 7.5"
    with Image.open(io.BytesIO(chart.png())) as picture:
        assert picture.size == (2 * width, 2 * height)


def test_a_chart_of_nothing_or_of_no_numbers_is_refused() -> None:
    for points in ([], [Point(1.0, float("nan"))]):
        with pytest.raises(ValueError, match="expected at least one, all of finite numbers"):
            Chart("t", "x", "y", [Series("a", points)])


def test_ticks_differ_in_what_they_say_and_whole_numbers_have_whole_ones() -> None:
    points = [Point(x, 5.64912 + 0.00001 * x) for x in (1, 2)]
    svg = Chart("t", "steps", "FID", [Series("s", points)]).svg()
    words = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    ticks = [word for word in words if word.replace(".", "").isdigit()]
    assert len(set(ticks)) == len(ticks)
    assert {"1", "2"} <= set(ticks)
    assert "1.5" not in ticks


def test_a_series_that_is_no_line_has_dots_alone() -> None:
    points = [Point(1, 2.0), Point(2, 3.0)]
    counts = [Chart("t", "x", "y", [Series("s", points, is_line=line)]).svg().count('class="s0"') for line in (1, 0)]
    assert counts == [1, 0]
