"""`ldm evaluate` leaves a page, and a sweep of it one page with curves, also over lengths of post-hoc averages."""

import os
from pathlib import Path

import pytest
from cli_helpers import CONFIG_DIR, only, read_json

from ldm.cli.main import main

pytestmark = pytest.mark.slow
METRICS = [*CONFIG_DIR, "metric=[toy_fid]", "num_samples=6", "report.neighbours=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `toy_pictures` that kept snapshots."""
    folder, before = tmp_path_factory.mktemp("sweep"), Path.cwd()
    os.chdir(folder)
    try:
        tracking = ["callback=[checkpoint,post_hoc_ema]", "callback.post_hoc_ema.every_n_steps=1"]
        assert main(["train", *CONFIG_DIR, "experiment=toy_pictures", *tracking]) == 0
    finally:
        os.chdir(before)
    return only(folder, "runs/toy_pictures/*")


def test_an_evaluation_leaves_a_page_with_strips_and_neighbours(run: Path) -> None:
    assert main(["evaluate", *METRICS, f"checkpoint={run}", "guidance.scale=3"]) == 0
    page = only(run, "evaluations/*/report.html")
    html = page.read_text()
    assert len(list((page.parent / "strips").glob("*.webp"))) == 4
    for told in ("x_0 predictions after steps 1, 2 of 2", "training image ", "guidance.scale", "fid"):
        assert told in html
    before = page.parent.joinpath("strips/00000000.webp").stat().st_mtime_ns
    assert main(["evaluate", *METRICS, f"checkpoint={run}", "guidance.scale=3"]) == 0
    assert page.parent.joinpath("strips/00000000.webp").stat().st_mtime_ns == before


def test_a_sweep_ends_with_curves_of_all_its_jobs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "-m", *METRICS, f"checkpoint={run}", "guidance.scale=1,2", "ema=0.05,0.1", "report.strips=0"]
    assert main(words) == 0
    assert "4 evaluations in" in capsys.readouterr().out
    sweep = only(run, "evaluations/sweep-*")
    found = read_json(sweep / "comparison.json")["evaluations"]
    settings = [(one["protocol"]["guidance"]["scale"], one["protocol"]["ema"]["sigma_rel"]) for one in found]
    assert settings == [(1.0, 0.05), (1.0, 0.1), (2.0, 0.05), (2.0, 0.1)]
    lines = read_json(sweep / "curves/curves.json")["fid_ema_length__sigma_rel"]["series"]
    drawn = {(name, point["x"]): point["y"] for name, points in lines.items() for point in points}
    measured = {
        (f"guidance scale {scale:g}", length): one["figures"]["fid"]
        for one, (scale, length) in zip(found, settings, strict=True)
    }
    assert drawn == measured
    assert (sweep / "curves/fid_guidance_scale.png").read_bytes()[:4] == b"\x89PNG"
    html = (sweep / "report.html").read_text()
    assert html.count("training image ") > 4
    assert "real image " not in html
    pages = [Path(one["path"]) / "report.html" for one in found]
    assert all(page.exists() for page in pages)
    # With report=null no job has a page of its own, and that of the sweep looks for no neighbours.
    for page in pages:
        page.unlink()
    assert main([*words[:-1], "report=null"]) == 0
    assert not any(page.exists() for page in pages)
    assert "training image " not in (sweep / "report.html").read_text()


def test_a_length_that_cannot_be_made_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *METRICS, f"checkpoint={run}", "ema=0.5"]) == 2
    assert "got sigma_rel=0.5, expected more than 0" in capsys.readouterr().err
