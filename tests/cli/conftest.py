"""Runs `ldm` commands in an empty folder: in this process, or in one of their own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import CONFIG_DIR, environment

from ldm.cli.main import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ldm(folder: Path) -> Callable[..., int]:
    """Runs a command in this process, with the tests' own experiments, and returns its exit code."""

    def run(command: str, *overrides: str) -> int:
        return main([command, *CONFIG_DIR, *overrides])

    return run


@pytest.fixture
def ldm_process(folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command in a process of its own."""

    def run(command: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "ldm.cli.main", command, *CONFIG_DIR, *overrides]
        return subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run of `toy_pictures`."""
    folder = tmp_path_factory.mktemp("pictures")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["train", *CONFIG_DIR, "experiment=toy_pictures"]) == 0
    finally:
        os.chdir(before)
    return folder
