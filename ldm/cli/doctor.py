"""`ldm doctor`: looks at this machine and at how processes train together on it, and says what is wrong."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import DictConfig

from ldm.cli.compose import conf_folder
from ldm.cli.console import CHECK_FAILED, heading, say
from ldm.cli.doctor_combinations import combinations, versions
from ldm.cli.doctor_machine import Check, device, environment, storage, threads
from ldm.cli.errors import RunFailed, UserError, one_line
from ldm.cli.run_folder import write_json

STYLES = {"ok": "", "note": "yellow", "FAILED": "bold red"}


def doctor(config: DictConfig, overrides: Sequence[str]) -> None:
    """Prints every check as a line, and writes them to `out`.

    Raises:
        UserError: a setting is wrong.
        RunFailed: a check failed.
    """
    if config.megabytes < 1:
        raise UserError(f"megabytes: got {config.megabytes}, expected at least 1")
    if config.faults and not (_checkout() / "tests" / "faults" / "bench.py").is_file():
        raise UserError(
            f"faults: got true, expected a source checkout, whose tests/faults injects them; {_checkout()} has none"
        )
    checks: list[Check] = []
    folder = Path(str(config.folder or config.paths.runs)).expanduser().absolute()
    parts = {
        "versions": versions,
        "combinations known to be bad": combinations,
        "device": device,
        "threads": threads,
        f"storage: {folder}": lambda: storage(folder, megabytes=config.megabytes),
        "environment": environment,
    }
    for title, look in parts.items():
        _tell(title, look(), checks)
    if config.ranks:
        _tell("two processes and one (a tiny model on the CPU)", _ranks(), checks)
    if config.out is not None:
        write_json(Path(str(config.out)), {"checks": [vars(check) for check in checks]})
    if config.faults:
        _faults()
    _conclude(checks)


def _ranks() -> list[Check]:
    """What the trial of two processes finds."""
    from ldm.cli.doctor_ranks import judge
    from ldm.training import trial
    from ldm.training.fit import quieten

    quieten()
    started = time.monotonic()
    with TemporaryDirectory(prefix="ldm-doctor-") as folder:
        try:
            found = trial.run(Path(folder))
        except (RuntimeError, OSError) as error:
            return [Check("two processes train", "FAILED", one_line(error))]
    seconds = time.monotonic() - started
    return [Check("two processes train", "ok", f"through gloo, in {seconds:.0f} s"), *judge(found)]


def _tell(title: str, found: Sequence[Check], checks: list[Check]) -> None:
    heading(title)
    for check in found:
        mark = {"ok": "  ", "note": "! ", "FAILED": "X "}[check.status]
        say(f"  {mark}{check.name:<34} {check.text}", style=STYLES[check.status])
    checks += found


def _conclude(checks: Sequence[Check]) -> None:
    failed = [check.name for check in checks if check.status == "FAILED"]
    notes = sum(check.status == "note" for check in checks)
    heading(f"{len(checks)} checks, {notes} to note, {len(failed)} failed")
    if failed:
        raise RunFailed(f"failed: {'; '.join(failed)}", CHECK_FAILED)


def _faults() -> None:
    """Runs the fault matrix, which is part of a source checkout."""
    heading("faults")
    if subprocess.run([sys.executable, "-m", "tests.faults.bench"], cwd=_checkout()).returncode:
        raise RunFailed("the fault matrix has misses", CHECK_FAILED)


def _checkout() -> Path:
    return conf_folder().parent
