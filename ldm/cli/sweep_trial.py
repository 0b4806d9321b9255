"""One trial of a sweep: a `ldm train` of its own, as a process here or a job of a cluster, and what it has measured."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ldm.cli.errors import did_you_mean


class Job(Protocol):
    """A command under way."""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""

    def stop(self) -> None:
        """Asks it to save a checkpoint and end."""

    def kill(self) -> None:
        """Ends it at once."""


class LocalJob:
    """A process of this machine, which is no part of this one's terminal group, so that Ctrl-C reaches it once.

    Args:
        words: the command.
        log: its output is added to this file.
        devices: CUDA_VISIBLE_DEVICES, or None to leave it alone.
    """

    def __init__(self, words: Sequence[str], log: Path, *, devices: str | None = None) -> None:
        environment = dict(os.environ) if devices is None else {**os.environ, "CUDA_VISIBLE_DEVICES": devices}
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                list(words), stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
            )

    def poll(self) -> int | None:
        """Its exit code, negative for the signal that ended it, or None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """SIGTERM: training saves a checkpoint and ends; torchrun passes it on."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()


class SubmittedJob:
    """A job that submitit handed to a cluster.

    Args:
        job: what `executor.submit` returned.
    """

    def __init__(self, job: Any) -> None:
        self._job = job

    def poll(self) -> int | None:
        """The command's exit code, 1 where the job itself failed, or None while it waits or runs."""
        if not self._job.done():
            return None
        return 1 if self._job.exception() is not None else int(self._job.result())

    def stop(self) -> None:
        """Cancels it; SLURM sends SIGTERM first and waits for KillWait."""
        self._job.cancel()

    def kill(self) -> None:
        """Cancels it."""
        self._job.cancel()


class HeldFolder:
    """A run that another process is at work on, such as a trial whose sweep was killed: waited for, never stopped.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def poll(self) -> int | None:
        """0 once nobody holds the folder."""
        return None if is_held(self._folder) else 0

    def stop(self) -> None:
        """Nothing: it belongs to someone else."""

    def kill(self) -> None:
        """Nothing: it belongs to someone else."""


Start = Callable[[Sequence[str], Path, str | None], Job]


def start_local(words: Sequence[str], log: Path, devices: str | None) -> Job:
    """Starts a command on this machine."""
    return LocalJob(words, log, devices=devices)


def submitit_starter(folder: Path, settings: Mapping[str, Any]) -> Start:
    """What starts a command as a job of a cluster.

    Args:
        folder: for submitit's own files.
        settings: of `AutoExecutor.update_parameters`; `cluster` of its constructor.

    Raises:
        ModuleNotFoundError: submitit is not installed.
        ValueError: submitit does not know a setting.
    """
    submitit = import_module("submitit")

    settings = dict(settings)
    executor = submitit.AutoExecutor(folder=str(folder), cluster=settings.pop("cluster", None))
    executor.update_parameters(**settings)

    def start(words: Sequence[str], log: Path, devices: str | None) -> Job:
        return SubmittedJob(executor.submit(run_command, list(words), str(log)))

    return start


def run_command(words: list[str], log: str) -> int:
    """Runs a command where the cluster put it; returns its exit code."""
    with Path(log).open("ab") as file:
        return subprocess.run(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False).returncode


def is_held(folder: Path) -> bool:
    """Whether a living process is at work in a run folder."""
    try:
        with (folder / ".lock").open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


class Measured:
    """The objective in a run folder, as it grows.

    Args:
        folder: the run folder.
        objective: a column of metrics.csv, or a dotted place in result.json.
    """

    def __init__(self, folder: Path, objective: str) -> None:
        self.folder, self.objective = folder, objective
        self._stamp: tuple[int, int] | None = None
        self._values: dict[int, float] = {}

    def values(self) -> dict[int, float]:
        """The column's values by step."""
        try:
            state = (self.folder / "metrics.csv").stat()
        except FileNotFoundError:
            return {}
        if self._stamp != (state.st_mtime_ns, state.st_size):
            self._stamp = (state.st_mtime_ns, state.st_size)
            self._values = dict(self._read())
        return self._values

    def final(self, choose: Callable[[list[float]], float]) -> float | None:
        """What `choose` makes of the column, or the number in result.json, or None where there is neither."""
        values = self.values()
        if values:
            return choose([values[step] for step in sorted(values)])
        node: Any = self._result()
        for part in self.objective.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return float(node) if isinstance(node, int | float) and not isinstance(node, bool) else None

    def missing(self) -> str:
        """One line for an objective that a finished run does not hold."""
        columns = list(self._rows()[0]) if self._rows() else []
        names = [name for name in columns if name not in ("step", "epoch")]
        names += [name for name, _ in _numbers(self._result())]
        hint = did_you_mean(self.objective, names) or ";"
        return f"objective: {self.objective}: the run measured no such thing{hint} It has {', '.join(names)}"

    def _read(self) -> list[tuple[int, float]]:
        rows = [row for row in self._rows() if row.get(self.objective) and row.get("step")]
        return [(int(row["step"]), _number(row[self.objective])) for row in rows]

    def _rows(self) -> list[dict[str, str]]:
        path = self.folder / "metrics.csv"
        if not path.is_file():
            return []
        with path.open(newline="") as file:
            # The run may be writing its last row.
            return list(csv.DictReader(line for line in file.readlines() if line.endswith("\n")))

    def _result(self) -> dict[str, Any]:
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.is_file() else {}


def last_error(log: Path) -> str | None:
    """What the command of a log complained of last, in one line."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return said[-1] if said else next((line.strip() for line in reversed(lines) if line.strip()), None)


def wait_all(jobs: Sequence[Job], *, seconds: float) -> None:
    """Stops jobs and waits for them to end; ends those at once that take longer."""
    for job in jobs:
        job.stop()
    deadline = time.monotonic() + seconds
    waiting = [job for job in jobs if not isinstance(job, HeldFolder)]
    while (waiting := [job for job in waiting if job.poll() is None]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for job in waiting:
        job.kill()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _numbers(node: Any, prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in node.items() if isinstance(node, dict) else ():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}{name}", float(value)))
        found += _numbers(value, f"{prefix}{name}.")
    return found
