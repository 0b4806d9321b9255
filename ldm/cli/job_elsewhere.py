"""Jobs of a sweep that a launcher of Hydra's runs in other processes: the sweep's folder tells how they ended."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Protocol

from ldm.cli.console import complain, rank, say

# Launchers whose jobs may run on other machines, which then must see the sweep's folder.
FAR = "hydra/launcher=submitit"


class Outcome(Protocol):
    """How jobs ended, so far as they ran in this process."""

    code: int
    lines: list[str]
    results: list[Any]


@contextmanager
def sweep_folder(arguments: Sequence[str], outcome: Outcome) -> Iterator[Path]:
    """A folder that Hydra and its launchers write to, gone afterwards; but submitit's logs stay where a job failed."""
    is_far = any(item.startswith(FAR) for item in arguments)
    folder = Path(mkdtemp(prefix="ldm-jobs-", dir=Path.cwd() if is_far else None))
    try:
        yield folder
    finally:
        if is_far and (outcome.code or sys.exc_info()[0] is not None):
            say(f"what the jobs wrote: {folder.name}/.submitit")
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def telling(outcome: Outcome, folder: Path, number: int) -> Iterator[None]:
    """Leaves in the sweep's folder how the job ended that runs here, in a copy of `outcome`."""
    # Launchers may hand one copy to several jobs.
    outcome.code, outcome.lines, outcome.results = 0, [], []
    yield
    if rank() == 0:
        paths = [str(result) for result in outcome.results if isinstance(result, Path)]
        ended = {"code": outcome.code, "lines": outcome.lines, "paths": paths}
        folder.mkdir(parents=True, exist_ok=True)
        _file(folder, number).write_text(json.dumps(ended))


def gather(outcome: Outcome, folder: Path) -> None:
    """Adds what jobs elsewhere told, in their order, and says again why some failed: their own lines lie far above."""
    files = sorted(folder.glob(_file(Path(), "*").name), key=lambda path: int(path.stem.partition("-")[2]))
    for path in files:
        ended = json.loads(path.read_text())
        outcome.code = ended["code"] or outcome.code
        outcome.results += map(Path, ended["paths"])
        for line in ended["lines"]:
            complain(f"job {path.stem.partition('-')[2]}: {line}")


def _file(folder: Path, number: int | str) -> Path:
    return folder / f"outcome-{number}.json"
