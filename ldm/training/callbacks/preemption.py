"""How a run stops on a signal: behind a step, all ranks together, saved, and back in the queue where there is one."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from ldm.training.checkpoints import Checkpoints, join, poll

# In a run of several processes they agree on stopping only every so many steps, or seconds where steps take long:
# agreeing waits for the device.
AGREE_EVERY = 10
AGREE_SECONDS = 2.0
# A launcher that passes a signal on to processes that got it themselves doubles it within moments.
SAME_SIGNAL_SECONDS = 1.0


class Stopped(Exception):
    """A signal asked training to stop, and what had to be saved is saved."""


class StopOnSignal(pl.callbacks.Checkpoint):
    """On a signal lets the step under way end, saves a checkpoint on all ranks and raises `Stopped`.

    The same signal again, or Ctrl-C, ends at once. The handler does no more than to set a flag: Lightning's own saves,
    broadcasts and starts processes inside signal handlers, drops the step that Ctrl-C interrupts, and waits for the
    device at every step of several processes; it is switched off. Being a `Checkpoint`, this runs after all other
    callbacks of a step. Processes of a data loader inherit the handler and so outlive what a terminal or a cluster
    sends to all of them.

    Under SLURM, signals that announce the end of the time (`#SBATCH --signal=USR1@120`) put the job back into the queue
    once the checkpoint is there. SIGTERM does not: after a preemption SLURM itself does so, and after `scancel` nobody
    wants it to.

    Args:
        signals: names of those that stop a run, besides Ctrl-C's SIGINT.
        requeue: those of them that put a SLURM job back into the queue; none = never.

    Raises:
        ValueError: there is no such signal, or one of `requeue` stops nothing.
    """

    def __init__(
        self,
        *,
        signals: Sequence[str] = ("SIGTERM", "SIGUSR1", "SIGUSR2"),
        requeue: Sequence[str] = ("SIGUSR1", "SIGUSR2"),
    ) -> None:
        unknown = [name for name in signals if name not in signal.Signals.__members__]
        if unknown:
            raise ValueError(f"signals: got {', '.join(unknown)}, expected names such as SIGTERM")
        useless = [name for name in requeue if name not in signals]
        if useless:
            raise ValueError(f"requeue: got {', '.join(useless)}, expected some of signals={', '.join(signals)}")
        self.signals = (signal.SIGINT, *(signal.Signals[name] for name in signals))
        self.requeue = tuple(signal.Signals[name] for name in requeue)
        self.began = False
        self.is_first_rank = True
        self._asked: signal.Signals | None = None
        self._asked_at = 0.0
        self._saved = False
        self._previous_step = 0
        self._agree_at = 0
        self._agreed_before = (0, 0.0)
        self._previous: Mapping[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        # Only a process's main thread may handle signals.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in self.signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> signal.Signals | None:
        """The signal that this process, or since all agreed any of them, was asked by to stop."""
        return self._asked

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Switches Lightning's own signal handling off."""
        trainer._signal_connector.register_signal_handlers = _do_nothing  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _do_nothing  # type: ignore[method-assign]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on an error is training's own."""
        self.began = True
        self.is_first_rank = trainer.is_global_zero
        self._previous_step = trainer.global_step
        self._agree_at = trainer.global_step + 1
        self._agreed_before = (trainer.global_step, time.monotonic())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves behind an optimizer step, never among gradients that are still being gathered."""
        poll(trainer)
        stepped = trainer.global_step > self._previous_step
        self._previous_step = trainer.global_step
        if not stepped or not self._agreed(trainer):
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.save(trainer)
        join(trainer)
        self._saved = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops, now that the saved step's metrics are logged.

        Raises:
            Stopped: a signal asked for it and the checkpoint is saved.
        """
        if self._saved:
            raise Stopped

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops before a validation rather than after it.

        Raises:
            Stopped: a signal asked for it and the checkpoint is saved.
        """
        if self._saved:
            raise Stopped

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops behind the last step too, where the end is saved: what follows training may take long.

        Raises:
            Stopped: a signal asked for it.
        """
        self._agree_at = trainer.global_step
        if self._agreed(trainer):
            raise Stopped

    def put_back(self) -> bool:
        """Requeues the SLURM job that this is, from the first rank, if the signal asks for it; says whether it did."""
        job = os.environ.get("SLURM_JOB_ID")
        if job is None or not self.is_first_rank or self._asked not in self.requeue:
            return False
        return requeue(job)

    def _agreed(self, trainer: pl.Trainer) -> bool:
        """Whether any rank was asked to stop; of several processes, at the steps at which they ask each other."""
        if trainer.world_size == 1:
            return self._asked is not None
        step, now = trainer.global_step, time.monotonic()
        if step < self._agree_at:
            return False
        steps, seconds = max(1, step - self._agreed_before[0]), now - self._agreed_before[1]
        mine = torch.tensor([float(self._asked or 0), seconds / steps], device=trainer.strategy.root_device)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        number, seconds_per_step = mine.tolist()
        # The same on every rank, as it is made of what all have now.
        pause = steps_between(seconds_per_step)
        self._agree_at = (step // pause + 1) * pause
        self._agreed_before = (step, now)
        if number:
            self._asked = signal.Signals(int(number))
        return bool(number)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked is None:
            self._asked, self._asked_at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._asked_at > SAME_SIGNAL_SECONDS and number in (self._asked, signal.SIGINT):
            raise KeyboardInterrupt


def steps_between(seconds_per_step: float) -> int:
    """Steps from one agreement to the next: no more than take `AGREE_SECONDS`, and `AGREE_EVERY` at most."""
    return max(1, min(AGREE_EVERY, int(AGREE_SECONDS / max(seconds_per_step, 1e-9))))


def requeue(job: str) -> bool:
    """Puts a SLURM job back into the queue if SLURM says that it may be; returns whether it did, and warns if not."""
    try:
        shown = _scontrol("show", "job", job)
        if "Requeue=1" not in shown:
            warnings.warn(f"SLURM job {job} may not be requeued: submit it with --requeue", stacklevel=2)
            return False
        _scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(f"SLURM job {job} could not be requeued ({error}); submit it again", stacklevel=2)
        return False
    return True


def _scontrol(*words: str) -> str:
    done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=30, check=True)
    return done.stdout


def _do_nothing() -> None:
    """Takes the place of Lightning's own signal handling."""
