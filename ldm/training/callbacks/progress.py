"""Progress: a bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from ldm.training.callbacks.throughput import num_images

BAR_REFRESH_SECONDS = 0.5
# The rate is an average over this many refreshes: long enough to be steady, short enough to follow changes.
WINDOW = 20


@dataclass(frozen=True)
class Status:
    """Where training stands.

    Args:
        step: optimizer steps done.
        total: optimizer steps to do; None when that is not known.
        metrics: names and values to show.
        images_per_second: of all devices; None until it is known.
        seconds_left: None until it is known.
    """

    step: int
    total: int | None
    metrics: dict[str, float]
    images_per_second: float | None = None
    seconds_left: float | None = None

    def parts(self) -> list[str]:
        """The status in words, without the step."""
        words = [f"{name} {value:.4g}" for name, value in self.metrics.items()]
        if self.images_per_second is not None:
            words.append(f"{self.images_per_second:,.0f} images/s")
        if self.seconds_left is not None:
            words.append(f"{clock(self.seconds_left)} left")
        return words


class Display(Protocol):
    """Something that shows a status: `show` at least every `refresh_seconds`, then `stop`."""

    refresh_seconds: float

    def show(self, status: Status) -> None: ...

    def stop(self) -> None: ...


class LineDisplay:
    """One line a status, for logs.

    Args:
        stream: where the lines go.
        refresh_seconds: time between two lines.
    """

    def __init__(self, stream: TextIO, *, refresh_seconds: float) -> None:
        self.stream = stream
        self.refresh_seconds = refresh_seconds

    def show(self, status: Status) -> None:
        """Writes a line."""
        total = f"/{status.total}" if status.total is not None else ""
        print("  ".join([f"step {status.step}{total}", *status.parts()]), file=self.stream, flush=True)

    def stop(self) -> None:
        """Lines need no end."""


class BarDisplay:
    """A bar that stays in its place.

    Args:
        stream: the terminal.
    """

    refresh_seconds = BAR_REFRESH_SECONDS

    def __init__(self, stream: TextIO) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = RichProgress(*columns, console=Console(file=stream), refresh_per_second=4)
        self._task = self._bar.add_task("")

    def show(self, status: Status) -> None:
        """Moves the bar."""
        self._bar.start()
        words = "  ".join(status.parts()).replace("[", r"\[")
        self._bar.update(self._task, completed=status.step, total=status.total, description=words)

    def stop(self) -> None:
        """Leaves the bar as it is and gives the terminal back."""
        self._bar.stop()


class Progress(pl.callbacks.ProgressBar):
    """Shows steps, loss, images/s and time left: as a rich bar on a terminal, else as a line every so many seconds.

    Values are read off the device only when something is shown. That is why the metrics are named here: Lightning reads
    those logged with `prog_bar=True` on every step.

    Args:
        metrics: what to show of what the module logs; what is not there yet is left out.
        every_n_seconds: between two lines of the plain log.
    """

    def __init__(self, *, metrics: Sequence[str] = ("train/loss", "val/loss"), every_n_seconds: float = 10.0) -> None:
        super().__init__()
        self.metrics = tuple(metrics)
        self.every_n_seconds = every_n_seconds
        self._enabled = True
        self._display: Display | None = None
        self._images = 0
        self._shown: deque[tuple[float, int, int]] = deque(maxlen=WINDOW)
        self._last_step = -1

    def enable(self) -> None:
        """Shows progress."""
        self._enabled = True

    def disable(self) -> None:
        """Shows nothing, as on all ranks but the first."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        if not self._enabled:
            return
        self._display = make_display(sys.stdout, every_n_seconds=self.every_n_seconds)
        self._images = 0
        self._last_step = -1
        self._shown.clear()
        self._shown.append((time.perf_counter(), trainer.global_step, 0))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch; shows where it is time, and after the first one."""
        if self._display is None:
            return
        self._images += num_images(batch) * trainer.world_size
        since_last = time.perf_counter() - self._shown[-1][0]
        if self._last_step < 0 or since_last >= self._display.refresh_seconds:
            self._show(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows the end."""
        if self._display is not None and self._last_step != trainer.global_step:
            self._show(trainer)
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Gives the terminal back."""
        self._stop()

    def _show(self, trainer: pl.Trainer) -> None:
        assert self._display is not None
        step, total = trainer.global_step, total_steps(trainer)
        self._shown.append((time.perf_counter(), step, self._images))
        (start, first_step, first_images), (now, _, images) = self._shown[0], self._shown[-1]
        steps_per_second = (step - first_step) / (now - start)
        logged = trainer.callback_metrics
        metrics = {name.removeprefix("train/"): float(logged[name]) for name in self.metrics if name in logged}
        rate = (images - first_images) / (now - start)
        left = (total - step) / steps_per_second if total is not None and steps_per_second > 0 else None
        self._display.show(Status(step, total, metrics, images_per_second=rate, seconds_left=left))
        self._last_step = step

    def _stop(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None


def make_display(stream: TextIO, *, every_n_seconds: float) -> Display:
    """A bar where the stream is a terminal, otherwise lines."""
    if stream.isatty():
        return BarDisplay(stream)
    return LineDisplay(stream, refresh_seconds=every_n_seconds)


def total_steps(trainer: pl.Trainer) -> int | None:
    """Optimizer steps of the whole run; None for one without an end."""
    total = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
    return int(total) if math.isfinite(total) else None


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
