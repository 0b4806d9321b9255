"""Runs the trials of a sweep, some at once: starts, watches, prunes, takes up again, and passes failures over."""

from __future__ import annotations

import math
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ldm.cli.chain import shown
from ldm.cli.compose import compose_command
from ldm.cli.console import DIVERGED, STORAGE, USER_ERROR, say
from ldm.cli.errors import Interrupted, RunFailed, UserError, user_mistakes
from ldm.cli.run_folder import RunFolder
from ldm.cli.sweep_space import Value, override
from ldm.cli.sweep_study import Study, report, reported
from ldm.cli.sweep_trial import HeldFolder, Job, Measured, Start, is_held, last_error, wait_all

if TYPE_CHECKING:
    import optuna

# What another process's lock on the run folder makes `ldm train` say.
_AT_WORK = "is at work in this run folder"
# torchrun ends with 1 and tells its process's own code.
_CODE_OF_RANK = re.compile(r"exitcode\s*:\s*(-?\d+)")


@dataclass(frozen=True)
class Plan:
    """How trials run.

    Args:
        folder: the sweep's.
        command: what a trial's command begins with, up to and with `train` and Hydra's options.
        overrides: of every trial.
        objective: see `Measured`.
        choose: makes a trial's value of a column.
        num_trials: how many in all.
        workers: CUDA_VISIBLE_DEVICES of each trial that may run at once; None = as it is.
        start: starts a command.
        retries: how often a trial that died is taken up again.
        poll_seconds: between looks.
        grace_seconds: for a stopped trial to end.
    """

    folder: Path
    command: Sequence[str]
    overrides: Sequence[str]
    objective: str
    choose: Callable[[list[float]], float]
    num_trials: int
    workers: Sequence[str | None]
    start: Start
    retries: int
    poll_seconds: float
    grace_seconds: float

    def trial_overrides(self, values: dict[str, Value]) -> list[str]:
        """The overrides of a trial with these values."""
        return [*self.overrides, *(override(key, value) for key, value in values.items())]


@dataclass
class _Active:
    """A trial under way."""

    trial: optuna.trial.Trial
    words: Sequence[str]
    measured: Measured
    job: Job
    devices: str | None
    seen: set[int]
    started: float = field(default_factory=time.monotonic)
    tries: int = 0
    ends_as: str | None = None
    reason: str = ""
    deadline: float = math.inf

    def stop(self, outcome: str, reason: str, *, grace: float) -> None:
        """Stops the trial, once, to end as `outcome`."""
        self.ends_as, self.reason, self.deadline = outcome, reason, time.monotonic() + grace
        self.job.stop()


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], None]]:
    """Notes Ctrl-C and SIGTERM; what is yielded raises for them, where nothing is half written.

    A second one raises at once.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if len(noted) > 1:
            check()

    def check() -> None:
        if noted:
            raise KeyboardInterrupt if noted[0] == signal.SIGINT else Interrupted

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Trials:
    """The trials of a study, run by a plan.

    Args:
        study: what draws and remembers.
        plan: how they run.
    """

    def __init__(self, study: Study, plan: Plan) -> None:
        self.study, self.plan = study, plan
        self._active: list[_Active] = []
        self._waiting = study.unfinished()

    def run(self) -> None:
        """Runs until there are `num_trials`; an interruption stops the trials under way, to go on another time.

        Raises:
            UserError: trials do not measure the objective.
            RunFailed: checkpoints cannot be written.
            KeyboardInterrupt: a signal asked the sweep to stop.
        """
        with _asked_to_stop() as check:
            try:
                while self._fill():
                    time.sleep(self.plan.poll_seconds)
                    for active in list(self._active):
                        self._look_at(active)
                    check()
            finally:
                wait_all([active.job for active in self._active], seconds=self.plan.grace_seconds)

    def _fill(self) -> bool:
        """Starts trials while there is room; returns whether any are under way."""
        while len(self._active) < len(self.plan.workers):
            if self._waiting:
                trial = self._waiting.pop(0)
            elif len(self.study.trials) < self.plan.num_trials:
                trial = self.study.ask()
            else:
                break
            self._start(trial)
        return bool(self._active)

    def _start(self, trial: optuna.trial.Trial) -> None:
        values = self.study.values(trial)
        overrides = self.plan.trial_overrides(values)
        label = " ".join(override(key, value) for key, value in values.items())
        say(f"trial {trial.number}: {label}", style="bold")
        try:
            with user_mistakes():
                folder = RunFolder.of(compose_command("train", overrides), command="train").path
        except UserError as error:
            self._end(trial, "failed", reason=str(error))
            return
        trial.set_user_attr("run", str(folder))
        words = [*self.plan.command, *overrides]
        devices = self._free_devices()
        job = self._launch(trial, words, folder, devices)
        measured = Measured(folder, self.plan.objective)
        self._active.append(_Active(trial, words, measured, job, devices, seen=reported(trial)))

    def _launch(self, trial: optuna.trial.Trial, words: Sequence[str], folder: Path, devices: str | None) -> Job:
        if is_held(folder):
            return HeldFolder(folder)
        return self.plan.start(words, self._log(trial), devices)

    def _free_devices(self) -> str | None:
        taken = [active.devices for active in self._active]
        free = list(self.plan.workers)
        for devices in taken:
            free.remove(devices)
        return free[0]

    def _look_at(self, active: _Active) -> None:
        code = active.job.poll()
        values = active.measured.values()
        is_new = report(active.trial, values, active.seen)
        if code is not None:
            self._ended(active, code)
        elif isinstance(active.job, HeldFolder):
            return
        elif active.ends_as is not None:
            if time.monotonic() > active.deadline:
                active.job.kill()
        elif any(not math.isfinite(value) for value in values.values()):
            self._stop(active, "diverged", f"{self.plan.objective} is not finite")
        elif is_new and active.trial.should_prune():
            self._stop(active, "pruned", f"at step {max(values)}")

    def _stop(self, active: _Active, outcome: str, reason: str) -> None:
        active.stop(outcome, reason, grace=self.plan.grace_seconds)

    def _ended(self, active: _Active, code: int) -> None:
        error = last_error(self._log(active.trial)) or f"exit code {code}"
        code = self._code_of_rank(active, code)
        if isinstance(active.job, HeldFolder) or (code == USER_ERROR and _AT_WORK in error):
            # Another process had this run: go on from what it left.
            active.job = self._launch(active.trial, active.words, active.measured.folder, active.devices)
        elif code == 0:
            self._finished(active)
        elif active.ends_as is not None:
            self._close(active, active.ends_as, reason=active.reason)
        elif code == DIVERGED:
            self._close(active, "diverged", reason=error)
        elif code == STORAGE:
            raise RunFailed(f"trial {active.trial.number}: {error}", STORAGE)
        elif code == USER_ERROR or active.tries >= self.plan.retries:
            self._close(active, "failed", reason=error if code > 0 else f"ended by signal {-code}")
        else:
            active.tries += 1
            say(f"trial {active.trial.number}: died with code {code}; going on from its checkpoint", style="yellow")
            active.job = self._launch(active.trial, active.words, active.measured.folder, active.devices)

    def _finished(self, active: _Active) -> None:
        report(active.trial, active.measured.values(), active.seen)
        value = active.measured.final(self.plan.choose)
        if value is None:
            raise UserError(active.measured.missing())
        if math.isfinite(value):
            self._close(active, "finished", value=value)
        else:
            self._close(active, "diverged", reason=f"{self.plan.objective} is not finite")

    def _close(self, active: _Active, outcome: str, *, value: float | None = None, reason: str = "") -> None:
        self._active.remove(active)
        active.trial.set_user_attr("seconds", round(time.monotonic() - active.started, 1))
        self._end(active.trial, outcome, value=value, reason=reason)

    def _end(self, trial: optuna.trial.Trial, outcome: str, *, value: float | None = None, reason: str = "") -> None:
        self.study.tell(trial, outcome, value=value, reason=reason)
        result = f"{self.plan.objective} {value:.6g}" if value is not None else reason
        say(f"trial {trial.number}: {outcome}; {result}", style="" if outcome in ("finished", "pruned") else "yellow")
        if outcome == "failed":
            say(f"  its output: {shown(self._log(trial))}", style="dim")

    def _log(self, trial: optuna.trial.Trial) -> Path:
        return self.plan.folder / "trials" / f"{trial.number:04d}.log"

    def _code_of_rank(self, active: _Active, code: int) -> int:
        log = self._log(active.trial)
        if code != 1 or not log.is_file():
            return code
        told = _CODE_OF_RANK.findall(log.read_text(errors="replace"))
        return int(told[-1]) if told else code
