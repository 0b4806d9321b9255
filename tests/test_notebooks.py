"""Every notebook runs from top to bottom on a run of this version."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
CONFIG_DIR = ["--config-dir", str(Path(__file__).resolve().parent / "cli" / "conf")]
SMALL = ["network.model_channels=8", "network.norm_groups=4", "network.channel_mult=[1,2]"]


def test_there_is_one() -> None:
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.cli.main import main

    monkeypatch.chdir(tmp_path)
    assert main(["train", *CONFIG_DIR, "experiment=toy_pictures", "evaluation=null", *SMALL]) == 0
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    assert len(names["pictures"]) == 12
