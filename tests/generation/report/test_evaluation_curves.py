"""Curves of a sweep: the points are the figures, as pictures and as numbers."""

import itertools
import json
from pathlib import Path
from xml.etree import ElementTree

from evaluation_folders import write_evaluation
from PIL import Image

from ldm.generation.report import EvaluationFolder, curves, write_curves
from ldm.pages.chart import COLOURS


def sweep(folder: Path, *, samplers: tuple[str, ...] = ("DDIM", "Heun")) -> list[EvaluationFolder]:
    """Guidance and samplers crossed, in no order; FID is guidance^2, plus 1 for the second sampler."""
    found = []
    for place, (scale, sampler) in enumerate(itertools.product((3.0, 1.0, 1.5), samplers)):
        settings = {"sampler": {"name": sampler}, "guidance": {"scale": scale}}
        fid = scale**2 + samplers.index(sampler)
        path = write_evaluation(folder / str(place), num=2, fid=fid, clip=20 + scale, protocol=settings)
        found.append(EvaluationFolder(path))
    return found


def test_figures_are_drawn_against_what_was_varied_and_against_each_other(tmp_path: Path) -> None:
    found = curves(sweep(tmp_path))
    assert [curve.name for curve in found] == [
        "fid_clip_score",
        "fid_guidance_scale",
        "clip_score_guidance_scale",
        "fid_sampler",
        "clip_score_sampler",
    ]
    trade_off, against = found[0].chart, found[1].chart
    assert [(one.name, [(p.x, p.y, p.label) for p in one.points]) for one in trade_off.series] == [
        ("DDIM", [(21, 1, "1"), (21.5, 2.25, "1.5"), (23, 9, "3")]),
        ("Heun", [(21, 2, "1"), (21.5, 3.25, "1.5"), (23, 10, "3")]),
    ]
    assert [(p.x, p.y) for p in against.series[1].points] == [(1, 2), (1.5, 3.25), (3, 10)]
    assert found[3].chart.x_names == ("DDIM", "Heun")


def test_lengths_of_post_hoc_averages_are_an_axis(tmp_path: Path) -> None:
    found = []
    for sigma_rel in (0.2, 0.05, 0.1):
        told = {"ema": {"sigma_rel": sigma_rel, "step": 9, "error": 0.01}}
        found.append(EvaluationFolder(write_evaluation(tmp_path / str(sigma_rel), num=2, fid=sigma_rel, protocol=told)))
    chart = next(curve.chart for curve in curves(found) if curve.name == "fid_ema_length__sigma_rel")
    assert [(p.x, p.y) for p in chart.series[0].points] == [(0.05, 0.05), (0.1, 0.1), (0.2, 0.2)]


def test_nothing_varied_is_no_curve(tmp_path: Path) -> None:
    one, other = (EvaluationFolder(write_evaluation(tmp_path / name, num=2)) for name in "ab")
    assert curves([one, other]) == curves([one]) == []


def test_curves_are_written_as_svg_png_and_numbers(tmp_path: Path) -> None:
    out = tmp_path / "out"
    paths = write_curves(curves(sweep(tmp_path / "in")), out)
    svg = ElementTree.parse(paths[0]).getroot()
    names = [child.tag.rpartition("}")[2] for child in svg]
    assert names.count("circle") == 6 + 2  # and the legend's
    with Image.open(paths[0].with_suffix(".png")) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or ()}
    wanted = {tuple(int(COLOURS[i][k : k + 2], 16) for k in (1, 3, 5)) for i in range(2)}
    assert wanted <= colours
    numbers = json.loads((out / "curves.json").read_text())
    assert numbers["fid_sampler"]["series"]["guidance scale 3"] == [
        {"x": "DDIM", "y": 9.0, "label": ""},
        {"x": "Heun", "y": 10.0, "label": ""},
    ]
