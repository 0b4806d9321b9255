"""Processes that faults are injected into: forks of this one for `ldm` commands, and new ones for several ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LDM = [sys.executable, "-m", "ldm.cli.main"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TWO_RANKS = ("strategy=ddp", "trainer.devices=2")


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Args:
        code: its exit code, negative for a signal.
        text: what it printed.
        seconds: how long it took; of several ranks, until the last of them was gone.
        left: processes that outlived it and did not end by themselves.
    """

    code: int
    text: str
    seconds: float
    left: int = 0

    def line(self, beginning: str) -> str:
        """The first line that holds these words, or nothing."""
        return next((line for line in self.text.splitlines() if beginning in line), "")

    @property
    def errors(self) -> list[str]:
        """Lines that say a mistake."""
        return [line for line in self.text.splitlines() if line.startswith("error: ")]


class Child:
    """A fork of this process that does something, with its output in a file.

    A fork has everything imported, so that a command takes a moment; this process must never have computed with
    several threads.
    """

    def __init__(self, action: Callable[[], int | None], folder: Path, environment: Mapping[str, str]) -> None:
        self.output = folder / f"output-{time.monotonic_ns()}.txt"
        self.started = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process == 0:
            _be_child(action, folder, self.output, environment)

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process, number)

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> bool:
        """Whether a condition came true while the process ran."""
        wait_until(lambda: condition() or not runs(self.process), seconds)
        return bool(condition())

    def wait(self, seconds: float = 120) -> Outcome:
        """Waits for its end; one that takes longer is killed, which shows as -9."""
        end = self.started + seconds * slowness()
        while time.monotonic() < end:
            done, status = os.waitpid(self.process, os.WNOHANG)
            if done:
                return self._outcome(status)
            time.sleep(0.005)
        os.killpg(self.process, signal.SIGKILL)
        return self._outcome(os.waitpid(self.process, 0)[1])

    def _outcome(self, status: int) -> Outcome:
        code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - self.started
        return Outcome(code, self.output.read_text(errors="replace"), seconds)


class Setting:
    """Where a row is injected: a folder of its own, and what several rows share.

    Args:
        folder: empty.
        shared: of all rows.
        quick: fewer trials.
    """

    def __init__(self, folder: Path, shared: Path, *, quick: bool = False) -> None:
        self.folder, self.shared, self.quick = folder, shared, quick
        folder.mkdir(parents=True, exist_ok=True)

    def trials(self, whole: int, quick: int) -> int:
        """How many."""
        return quick if self.quick else whole

    @cached_property
    def colours(self) -> Path:
        """Shards of 24 small pictures."""
        folder = self.shared / "colours"
        if not folder.exists():
            import tiny_models

            tiny_models.write_colours(folder)
        return folder

    def words(self, *overrides: str) -> list[str]:
        """The toy experiment's command line."""
        data = [] if any(word.startswith("data.train=") for word in overrides) else [f"data.train={self.colours}"]
        return ["train", "--config-dir", str(HERE / "conf"), "experiment=faulty", *data, *overrides]

    def run_of(self, run_id: str) -> Path:
        """The folder of a run of the toy experiment."""
        return self.folder / "runs" / "faulty" / run_id

    def start(self, *words: str, **environment: str) -> Child:
        """Starts an `ldm` command in a fork."""

        def action() -> int:
            from ldm.cli.main import main

            sys.argv = ["ldm", *words]
            return main(list(words))

        return Child(action, self.folder, environment)

    def ldm(self, *words: str, seconds: float = 120, **environment: str) -> Outcome:
        """Runs an `ldm` command in a fork."""
        return self.start(*words, **environment).wait(seconds)

    def train(self, *overrides: str, **environment: str) -> Outcome:
        """Trains the toy experiment in a fork."""
        return self.ldm(*self.words(*overrides), **environment)

    def anew(self, *words: str, seconds: float = 120) -> Outcome:
        """Runs an `ldm` command as a user does, in a process that imports everything itself."""
        return Ranked([*LDM, *words], self.folder).wait(seconds)

    def call(self, action: Callable[[], Any], *, seconds: float = 240, **environment: str) -> Any:
        """What a function returns, as JSON, in a fork."""
        result = self.folder / f"result-{time.monotonic_ns()}.json"
        outcome = Child(lambda: _save(result, action()), self.folder, environment).wait(seconds)
        if outcome.code:
            raise RuntimeError(f"exit code {outcome.code}: {outcome.text[-1500:]}")
        return json.loads(result.read_text())

    def start_ranks(self, *overrides: str, restarts: int | None = None) -> Ranked:
        """Starts two ranks: by Lightning's own launcher, or by torchrun with so many restarts."""
        words = self.words(*TWO_RANKS, *overrides)
        launcher = LDM if restarts is None else [*TORCHRUN, "--max-restarts", str(restarts), *LDM[1:]]
        return Ranked([*launcher, *words], self.folder)

    def ranks(self, *overrides: str, restarts: int | None = None, seconds: float = 150) -> Outcome:
        """Trains the toy experiment in two ranks."""
        return self.start_ranks(*overrides, restarts=restarts).wait(seconds)

    def clean(self, name: str, *overrides: str, two: bool = False) -> Path:
        """Where an undisturbed run of the toy experiment left what it ended with; made once."""
        setting = self if self.folder == self.shared else Setting(self.shared, self.shared)
        run = setting.run_of(name)
        if not (run / "result.json").exists():
            outcome = (setting.ranks if two else setting.train)(f"run_id={name}", *overrides)
            if outcome.code:
                raise RuntimeError(f"the clean run {name} ended with {outcome.code}: {outcome.text[-1500:]}")
        return run


class Ranked:
    """A command that starts several ranks, in a process group of its own, which ends with it."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.output = folder / f"output-{time.monotonic_ns()}.txt"
        paths = os.pathsep.join([str(ROOT), str(HERE), str(HERE.parent / "training")])
        self.started = time.monotonic()
        with self.output.open("w") as file:
            environment = os.environ | {"PYTHONPATH": paths}
            options: dict[str, Any] = {"cwd": folder, "env": environment, "stdout": file, "stderr": file}
            self.process = subprocess.Popen(command, start_new_session=True, **options)

    def wait(self, seconds: float = 150, *, linger: float = 15) -> Outcome:
        """Waits for its end and for that of what it started; what takes longer is killed, and shows: -9, or `left`."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds * slowness())
        is_late = self.process.poll() is None
        if not is_late:
            wait_until(lambda: not members(self.process.pid), linger * slowness())
        took, left = time.monotonic() - self.started, 0 if is_late else len(members(self.process.pid))
        if is_late:
            # torchrun's ranks are in groups of their own, and end with it only if it is asked.
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(40)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = -signal.SIGKILL if is_late else self.process.wait()
        self.process.wait()
        return Outcome(code, self.output.read_text(errors="replace"), took, left)


def checkpoints(run: Path) -> list[int]:
    """Steps of a run's checkpoints."""
    return sorted(int(path.stem.removeprefix("step=")) for path in (run / "checkpoints").glob("step=*.ckpt"))


def steps_seen(run: Path, rank: int = 0) -> list[int]:
    """The steps that a run began, in order; some of them twice where it went on from a checkpoint."""
    path = run / "seen" / f"rank={rank}.txt"
    return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []


def samples_seen(run: Path, rank: int = 0) -> dict[int, str]:
    """Each step's samples, as they were the last time."""
    lines = (run / "seen" / f"rank={rank}.txt").read_text().splitlines()
    return {int(step): samples for step, samples in (line.split(" ", 1) for line in lines)}


def difference(run: Path, other: Path, *, rank: int = 0) -> float:
    """The largest difference between what two runs ended with: weights, moving average, moments; inf if any lacks."""
    return difference_of(run / "seen" / f"end-rank={rank}.pt", other / "seen" / f"end-rank={rank}.pt")


def difference_of(first: Path, second: Path) -> float:
    """Of two files of numbers; inf where one is not there."""
    import torch

    if not (first.is_file() and second.is_file()):
        return float("inf")
    a, b = (torch.load(path, weights_only=True) for path in (first, second))
    if a.keys() != b.keys():
        return float("inf")
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a if a[name].numel())


def same_metrics(run: Path, other: Path) -> bool:
    """Whether two runs left the same metrics.csv, byte for byte."""
    return (run / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> bool:
    """Whether a condition came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def runs(process: int) -> bool:
    """Whether a process has not ended, whether or not anyone has asked."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def members(group: int) -> list[int]:
    """Living processes of a process group."""
    return [process for process, state in _processes() if state[2] == str(group)]


def children(process: int) -> list[int]:
    """Living processes that another one started."""
    return [child for child, state in _processes() if state[1] == str(process)]


def _processes() -> Iterator[tuple[int, list[str]]]:
    """Each living process and what the system says of it: its state, its parent, its group ..."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state = path.read_text().rpartition(")")[2].split()
            if state[0] not in ("Z", "X"):
                yield int(path.parent.name), state


def slowness() -> float:
    """How many times as long as on an idle machine everything takes, by what else runs on it; at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def in_time(took: float, seconds: float) -> tuple[bool, str]:
    """Whether something took no longer than it may on an idle machine, and the words for it; a busy one may take longer
    by its load, which the words say."""
    limit, load = seconds * slowness(), os.getloadavg()[0]
    stretched = f", stretched to {limit:.1f} s by a load of {load:.1f} on {os.cpu_count()} cores"
    return took <= limit, f"{took:.1f} s (limit {seconds:g} s{stretched if limit > seconds else ''})"


def num_tracebacks(text: str) -> int:
    """Tracebacks in an output, whichever rank's prefix is before them."""
    return len(re.findall(r"Traceback \(most recent call last\)", text))


def _be_child(action: Callable[[], int | None], folder: Path, output: Path, environment: Mapping[str, str]) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        os.chdir(folder)
        code = action() or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


def _save(path: Path, value: Any) -> int:
    path.write_text(json.dumps(value))
    return 0
