"""What the tests of the command line share."""

import json
import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CONFIG_DIR = ["--config-dir", str(HERE / "conf")]


def environment() -> dict[str, str]:
    """For processes of their own: the checkout and the toys are importable, one thread."""
    kept = {key: value for key, value in os.environ.items() if key not in ("LDM_TRACEBACK", "HYDRA_FULL_ERROR")}
    return {**kept, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}


def only(folder: Path, pattern: str) -> Path:
    """The single path that a pattern matches."""
    found = list(folder.glob(pattern))
    assert len(found) == 1, found
    return found[0]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
