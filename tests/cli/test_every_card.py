"""Every paper card trains in miniature, with all that it requires; what several require is trained once."""

import shutil
from pathlib import Path

import pytest

from ldm.cli.compose import conf_folder
from ldm.cli.main import main

CARDS = sorted(file.stem for file in (conf_folder() / "experiment/paper").glob("*.yaml"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all cards run."""
    return tmp_path_factory.mktemp("cards")


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_a_card_trains_in_miniature(name: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    assert main(["train", f"experiment=paper/{name}", "+scale=tiny"]) == 0
    assert list(runs.glob(f"runs/tiny/paper_{name}/*/result.json"))
    # What requires the run reads its weights; the checkpoints of all cards are 5 GB.
    for folder in runs.glob("runs/tiny/*/*/checkpoints"):
        shutil.rmtree(folder)
