"""Ends a run whose ranks died, failed or hang: all of them, within seconds, with one message."""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import pytorch_lightning as pl
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher, subprocess_script

from ldm.training.callbacks.preemption import Stopped
from ldm.training.callbacks.spike_guard import Diverged, RolledBack
from ldm.training.honesty import RanksDisagree
from ldm.training.ranks import ATTEMPT_VARIABLE, OtherRankFailed, Ranks, attempt, failing_rank

# What all ranks raise together.
AGREED = (Stopped, RolledBack, Diverged, RanksDisagree)
# How many times as long as a step what happens outside training may take: checkpoints, pictures, metrics.
OUTSIDE = 10
# Seconds that ranks wait for what the others say, and for the one that says it for all.
LISTEN_SECONDS, REPORT_SECONDS = 1.0, 5.0
# Seconds from a failure to the end, whatever libraries do on their way out; and for a rank that has said nothing.
EXIT_SECONDS, END_SECONDS = 10.0, 3.0


class Watchdog(pl.Callback):
    """Watches over this process's steps and over the other ranks, from a thread of its own; `fit` starts it.

    A rank that raises says so in a file, as in a collective it would wait for ranks that wait for it; the others see
    that, or that its process is gone, and end too. One reports for all. Where nothing happens for too long, every rank
    writes the stacks of all its threads to `stacks/rank=N.txt` in the run folder and ends with exit code 1, so that a
    launcher can start it again; also where a step never gives Python's threads a turn.

    A step costs a few assignments.

    Args:
        folder: of the run; processes on several machines share it.
        hang_timeout: seconds without a step; checkpoints, pictures and metrics may take 10 times as long.
        start_timeout: instead of that, until the first step has ended: processes meet, data are opened, a checkpoint is
            read, networks are compiled. Keep both below the process group's own timeout, which ends a run without
            saying where it hangs.
        poll_seconds: between two looks.

    Raises:
        ValueError: a number of seconds is not positive.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        hang_timeout: float = 540.0,
        start_timeout: float = 1500.0,
        poll_seconds: float = 0.5,
    ) -> None:
        given = {"hang_timeout": hang_timeout, "start_timeout": start_timeout, "poll_seconds": poll_seconds}
        for name, seconds in given.items():
            if seconds <= 0:
                raise ValueError(f"{name}: got {seconds}, expected seconds above 0; leave the callback out instead")
        self.folder, self.poll_seconds = Path(folder), poll_seconds
        self.hang_timeout, self.start_timeout = hang_timeout, start_timeout
        self._ranks: Ranks | None = None
        self._launcher: _SubprocessScriptLauncher | None = None
        self._step = self._batches = self._events = 0
        self._has_begun = False
        # One attribute, so that the watching thread never sees half of a change.
        self._awaited: tuple[float, float] | None = None
        self._armed_until = -math.inf
        self._answering = self._reported = False
        self._once = threading.Lock()
        self._stacks: IO[str] | None = None
        self._main_thread = threading.main_thread().ident

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches while the block runs; an error that leaves it is reported by one rank.

        Raises:
            OtherRankFailed: instead of the error, where that only follows from another rank's.
        """
        end, observer, environment = threading.Event(), subprocess_script._launch_process_observer, attempt_is_named()
        # Lightning's own observer kills this process without a word where a rank that it started has failed.
        subprocess_script._launch_process_observer = _do_nothing  # type: ignore[assignment]
        thread = threading.Thread(target=self._watch, args=(end,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        except AGREED:
            raise
        except Exception as error:
            self._answer(error)
            raise
        finally:
            end.set()
            thread.join()
            self._close_stacks()
            subprocess_script._launch_process_observer = observer
            if not environment:
                os.environ.pop(ATTEMPT_VARIABLE, None)
            if self._ranks is not None and not self._answering:
                self._ranks.leave()

    def follow(self, trainer: pl.Trainer) -> None:
        """Watches over a trainer, and over its ranks, from before it starts."""
        if trainer.world_size > 1 and self._ranks is None:
            self._join(trainer)
        self._has_begun = False
        self._await(self.start_timeout)

    def _join(self, trainer: pl.Trainer) -> None:
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher) and not attempt_is_named():
            self._launcher = launcher
            if not launcher.cluster_environment.creates_processes_externally:
                os.environ[ATTEMPT_VARIABLE] = f"{attempt()}-{time.time_ns()}"
        ranks = Ranks(self.folder, trainer.global_rank, trainer.world_size)
        ranks.join()
        self._ranks = ranks

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Around what takes longer than a step."""
        self._await(OUTSIDE * self.hang_timeout)
        try:
            yield
        finally:
            self._go_on()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on there are steps to wait for."""
        self._step = trainer.global_step
        self._go_on()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Counts."""
        self._step = trainer.global_step
        self._batches, self._events = self._batches + 1, 0
        self._go_on()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Counts."""
        self._has_begun = True
        self._events += 1
        self._go_on()

    def on_save_checkpoint(self, *args: Any) -> None:
        """A save may take longer than a step; what comes next ends that."""
        self._await(OUTSIDE * self.hang_timeout)

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Counts."""
        self._events += 1
        self._go_on()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts."""
        self._events += 1
        self._go_on()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """There are no more steps to wait for."""
        self._awaited = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tells the other ranks before anything else is done about it."""
        self._awaited = None
        if isinstance(exception, Exception) and not isinstance(exception, AGREED):
            self._tell(exception)

    def _go_on(self) -> None:
        self._await(self.hang_timeout if self._has_begun else self.start_timeout)

    def _await(self, seconds: float) -> None:
        """Something must happen within so many seconds from now on."""
        now = time.monotonic()
        self._awaited = (now, now + seconds)
        if now + seconds < self._armed_until:  # a start or a save, which may take longer, is over
            self._arm(seconds)

    def _tell(self, error: Exception) -> None:
        self._answering = self._ranks is not None
        if self._ranks is not None:
            line = " ".join(f"{type(error).__name__}: {error}".split())
            self._ranks.tell({"error": line, "step": self._step})

    def _answer(self, error: Exception) -> None:
        """Returns on the one rank that is to raise the error, to which it adds what the others were at."""
        self._tell(error)
        if self._ranks is None:
            return
        faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
        ranks, notes = self._ranks, self._ranks.wait_for_all(LISTEN_SECONDS)
        failing, gone = failing_rank(notes), self._gone()
        if failing is None and gone:
            self._report_gone(gone, notes)
        elif failing in (None, ranks.rank) and self._claims():
            error.add_note(f"{_place(ranks.rank, ranks, self._step)} failed; {_others(notes, ranks.rank)}")
            return
        ranks.wait_for_reporter(REPORT_SECONDS)
        raise OtherRankFailed from None

    def _watch(self, end: threading.Event) -> None:
        while not end.wait(self.poll_seconds):
            awaited = self._awaited
            if awaited is not None:
                since, until = awaited
                self._arm(until - time.monotonic())
                if time.monotonic() > until:
                    self._end_hanging(since)
            elif not self._answering:  # what follows training may take as long as it likes
                faulthandler.cancel_dump_traceback_later()
                self._armed_until = -math.inf
            ranks = self._ranks
            if ranks is not None and not self._answering:
                notes = ranks.told()
                if any("hangs" in note for note in notes.values()):
                    self._end_hanging(awaited[0] if awaited else time.monotonic())
                if notes or self._gone():
                    self._end_with_others(ranks, end)

    def _end_with_others(self, ranks: Ranks, end: threading.Event) -> None:
        """Ends this process, unless the main thread comes to it by itself."""
        ranks.tell({"step": self._step, "waits": self._where()})
        notes = ranks.wait_for_all(LISTEN_SECONDS)
        gone = self._gone()
        if failing_rank(notes) is None and gone and not self._answering:
            self._report_gone(gone, notes)
        ranks.wait_for_reporter(REPORT_SECONDS)
        if end.wait(0.2) or self._answering:
            return
        # This one may be the rank that the failing one waited for.
        faulthandler.dump_traceback(self._open_stacks(), all_threads=True)
        self._end_silent(notes)
        _exit()

    def _end_hanging(self, since: float) -> NoReturn:
        """Ends this process, in which nothing has happened since then, with its stacks in a file."""
        faulthandler.cancel_dump_traceback_later()
        stacks = self._open_stacks()
        faulthandler.dump_traceback(stacks, all_threads=True)
        seconds = time.monotonic() - since
        if self._ranks is None:
            self._say(f"nothing has happened for {seconds:.0f} s at step {self._step}, in {self._where()}")
            _exit()
        # Before it listens: in the meantime the main thread may hear that a rank which hangs has ended.
        ranks, reports = self._ranks, self._claims()
        order = [self._batches, self._events, self._communicates()]
        ranks.tell({"hangs": True, "step": self._step, "order": order, "waits": self._where()})
        notes = ranks.wait_for_all(LISTEN_SECONDS + self.poll_seconds)
        if reports:
            absent = [] if self._has_begun else ranks.absent()
            self._say(f"nothing has happened for {seconds:.0f} s: {_hanging(notes, self._gone(), absent, ranks)}")
        else:
            ranks.wait_for_reporter(REPORT_SECONDS)
        self._end_silent(notes)
        _exit()

    def _end_silent(self, notes: Mapping[int, Mapping[str, Any]]) -> None:
        """Ends ranks that this process started and that do not end by themselves: stopped, or waiting for a disk."""
        processes, end = self._launcher.procs if self._launcher is not None else [], time.monotonic() + END_SECONDS
        silent = [process for rank, process in enumerate(processes, 1) if rank not in notes]
        while any(process.poll() is None for process in silent) and time.monotonic() < end:
            time.sleep(0.05)
        for process in silent:
            process.kill()

    def _say(self, line: str) -> None:
        sys.stderr.write(f"error: {line}; the stacks of all threads are in {self.folder / 'stacks'}\n")

    def _report_gone(self, gone: list[int], notes: Mapping[int, Mapping[str, Any]]) -> None:
        """Says which ranks ended without a word, unless another rank says so."""
        assert self._ranks is not None
        if self._claims():
            which = " and ".join(f"rank {rank}" for rank in gone)
            sys.stderr.write(
                f"error: {which} of {self._ranks.world_size} ended without a word: killed, perhaps for want of memory; "
                f"{_others(notes, gone[0])}. The same command goes on from the newest checkpoint\n"
            )

    def _claims(self) -> bool:
        """Whether it is for the thread that asks to report: the first one that does, of all ranks."""
        assert self._ranks is not None
        with self._once:  # the main thread and the watching one may both come to it
            claims, self._reported = not self._reported and self._ranks.claim(), True
        return claims

    def _gone(self) -> list[int]:
        """Ranks that ended without a word."""
        assert self._ranks is not None
        processes = self._launcher.procs if self._launcher is not None else []
        ended = {rank for rank, process in enumerate(processes, 1) if process.poll()}
        return sorted(ended.union(self._ranks.dead()) - self._ranks.told().keys())

    def _communicates(self) -> bool:
        """Whether the main thread is where it would wait for another rank: in a collective, or in a backward pass."""
        return any(
            "torch/distributed/" in line.filename or line.name == "_engine_run_backward" for line in self._lines()
        )

    def _lines(self) -> list[traceback.FrameSummary]:
        frame = sys._current_frames().get(self._main_thread or 0)
        return traceback.extract_stack(frame)[::-1] if frame is not None else []

    def _where(self) -> str:
        """What the main thread is at: its innermost line outside the interpreter's and installed packages."""
        lines = self._lines()
        library = str(Path(os.__file__).parent)
        own = [line for line in lines if "site-packages" not in line.filename and not line.filename.startswith(library)]
        named = next(iter(own or lines), None)
        return "?" if named is None else f"{named.name} ({Path(named.filename).name}:{named.lineno})"

    def _arm(self, seconds: float) -> None:
        """Has the stacks written without Python's help if no thread gets a turn for so long."""
        later = max(seconds, 0) + 2 * self.poll_seconds + 0.2
        faulthandler.dump_traceback_later(later, exit=True, file=self._open_stacks())
        self._armed_until = time.monotonic() + seconds

    def _open_stacks(self) -> IO[str]:
        if self._stacks is None:
            rank = 0 if self._ranks is None else self._ranks.rank
            path = self.folder / "stacks" / f"rank={rank}.txt"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.exists() and path.stat().st_size:  # of the hang that this start follows
                    path.replace(path.with_suffix(".before.txt"))
                self._stacks = path.open("w")
            except OSError:  # a full disk
                return sys.__stderr__ or sys.stderr
        return self._stacks

    def _close_stacks(self) -> None:
        if not self._answering:
            faulthandler.cancel_dump_traceback_later()
        if self._stacks is not None:
            path = Path(self._stacks.name)
            self._stacks.close()
            with suppress(OSError):
                if not path.stat().st_size:
                    path.unlink()
                    path.parent.rmdir()
            self._stacks = None


def attempt_is_named() -> bool:
    """Whether Lightning started this process as a further rank."""
    return ATTEMPT_VARIABLE in os.environ


def _place(rank: int, ranks: Ranks, step: int) -> str:
    return f"rank {rank} of {ranks.world_size}, at step {step},"


def _hanging(notes: Mapping[int, Mapping[str, Any]], gone: list[int], absent: list[int], ranks: Ranks) -> str:
    """Which rank the others wait for: one that never came, or could not even say where it is, or came least far."""
    silent = [rank for rank in range(ranks.world_size) if rank not in notes]
    faults = {"never came to this run folder": absent, "gave Python no turn": gone, "says nothing": silent}
    for fault, which in faults.items():
        if which:
            named = ", ".join(map(str, which[:4])) + (f" and {len(which) - 4} more" if len(which) > 4 else "")
            return f"of {ranks.world_size} ranks {named} {fault}; {_others(notes, which[0])}"
    behind = min((note for note in notes.values() if "order" in note), key=lambda note: note["order"])
    who = f"{_place(behind['rank'], ranks, behind['step'])} hangs in {behind['waits']}"
    return f"{who}; {_others(notes, behind['rank'])}"


def _others(notes: Mapping[int, Mapping[str, Any]], but: int) -> str:
    """What the other ranks were at, the first four of them."""
    said = [
        f"rank {rank} was at step {note['step']}" + (f", in {note['waits']}" if "waits" in note else "")
        for rank, note in sorted(notes.items())
        if rank != but
    ]
    more = f" and {len(said) - 4} more" if len(said) > 4 else ""
    return "; ".join(said[:4]) + more if said else "no other rank said anything"


def _do_nothing(*args: Any) -> None:
    """Takes the place of Lightning's own observer."""


def _exit() -> NoReturn:
    """Ends the process at once: its main thread may never come back."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(1)
