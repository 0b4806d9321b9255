"""Two processes on the CPU against one, with the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_worker import MODULES, train
from tiny_models import write_colours
from torch import Tensor
from torch.testing import assert_close

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have trained."""
    folder = tmp_path_factory.mktemp("ddp")
    write_colours(folder / "colours")
    paths = os.pathsep.join([os.fspath(HERE.parents[1]), os.fspath(HERE)])
    finished = subprocess.run(
        [sys.executable, os.fspath(HERE / "ddp_worker.py"), os.fspath(folder)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    return folder


def result(folder: Path, name: str, rank: int) -> dict[str, dict[str, Tensor]]:
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("name", MODULES)
def test_both_ranks_end_with_the_same_weights_and_numbers(name: str, folder: Path) -> None:
    assert_close(result(folder, name, 0), result(folder, name, 1), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_two_processes_end_where_one_does(name: str, folder: Path) -> None:
    """Weights, their average, the numbers of validation and the measured latent scale."""
    alone = train(MODULES[name](), folder)
    together = result(folder, name, 0)
    assert_close(together["weights"], alone["weights"], rtol=1e-4, atol=2e-5)
    assert_close(together["numbers"], alone["numbers"], rtol=1e-4, atol=1e-5)
