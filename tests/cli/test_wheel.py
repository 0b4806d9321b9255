"""What `pip install` gets."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cli_helpers import ROOT, environment


@pytest.mark.slow
def test_the_wheel_ships_the_config_tree_and_works_from_any_folder(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("ldm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    assert {f"ldm/{name}" for name in shipped} <= names
    assert {f"ldm/generation/report/vote.{kind}" for kind in ("html", "css", "js")} <= names
    assert not any(name.startswith(("tests/", "conf/")) for name in names)
    words = [sys.executable, "-m", "ldm.cli.main", "train", "--cfg", "job"]
    separate = {**environment(), "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(words, cwd=tmp_path, env=separate, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "name: quickstart" in done.stdout
