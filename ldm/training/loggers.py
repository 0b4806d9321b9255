"""metrics.csv: a logger that goes on where a killed run stopped; and loggers that may fail without ending a run."""

from __future__ import annotations

import csv
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.loggers.logger import DummyExperiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ldm.files import replacing


class MetricsCSV(Logger):
    """Appends every logged row to `folder/metrics.csv`; new metrics become new columns.

    Lightning's CSVLogger deletes the file when a run resumes. Here a resumed run keeps it, less the rows of steps that
    the kill undid and that are trained again.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] | None = None
        self._last_row: dict[str, Any] = {}
        self._last_start = 0
        self._num_rows = 0

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.parent.parent.name

    @property
    def version(self) -> str:
        """The run's id."""
        return self.path.parent.name

    def state_dict(self) -> dict[str, Any] | None:
        """How far the file has come, for a checkpoint; None where this process does not know."""
        if self._columns is None:
            return None
        return {"rows": self._num_rows, "last": {name: str(value) for name, value in self._last_row.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Takes the file back to what it was then; leaves a shorter file, as of another run, as it is, and says so."""
        rows = self._rows()
        if not state["rows"] or len(rows) < state["rows"]:
            return False
        self._columns, last = list(rows[0]), dict(state["last"])
        self._rewrite([*rows[: state["rows"] - 1], last])
        self._num_rows = state["rows"]
        self._last_row = {**last, "step": int(last["step"]) if last.get("step", "None") != "None" else None}
        lines = self.path.read_bytes().splitlines(keepends=True)
        self._last_start = sum(map(len, lines[:-1]))
        return True

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing to write: the run folder holds the whole config."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes one row, or adds to the last one what is logged for the same step."""
        if not metrics:
            return
        if self._columns is None or _goes_back(self._last_row, step):
            self._columns, self._last_row = self._take_up(step), {}
        joins = self._last_row.get("step", -1) == step and not self._last_row.keys() & metrics.keys()
        self._num_rows += 0 if joins else 1
        self._last_row = {**(self._last_row if joins else {"step": step}), **metrics}
        new = sorted(name for name in metrics if name not in self._columns)
        if new:
            rows = self._rows()
            self._columns += new
            self._rewrite(rows[:-1] if joins else rows)
        self._write_last(at=self._last_start if joins and not new else None)

    def _write_last(self, *, at: int | None) -> None:
        """Writes the last row, over the one that starts at this byte or behind all others."""
        assert self._columns is not None
        with self.path.open("r+", newline="") as file:
            self._last_start = file.seek(0, os.SEEK_END) if at is None else file.seek(at)
            csv.DictWriter(file, self._columns, restval="").writerow(self._last_row)
            file.truncate()

    def _take_up(self, step: int | None) -> list[str]:
        """The columns of an earlier start, after dropping its rows from this step on."""
        rows = self._rows()
        self._num_rows = 0
        if not rows:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            return ["step"]
        self._columns = list(rows[0])
        kept = [row for row in rows if step is None or not row["step"] or int(row["step"]) < step]
        self._rewrite(kept)
        self._num_rows = len(kept)
        return self._columns

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            lines = file.readlines()
        # A kill can leave a last row without its end.
        return list(csv.DictReader(line for line in lines if line.endswith("\n")))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """Replaces the file in one move, so that a kill leaves the old one or the new one."""
        assert self._columns is not None
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


def _goes_back(row: Mapping[str, Any], step: int | None) -> bool:
    """Whether a step lies before the last row's, as after going back to a checkpoint."""
    return step is not None and row.get("step") is not None and step < int(row["step"])


# What Lightning and our callbacks call.
_CALLS = ("log_metrics", "log_hyperparams", "log_graph", "log_image", "save", "after_save_checkpoint", "finalize")


def outlive(loggers: Iterable[Logger], *, begun: Callable[[], bool]) -> None:
    """Makes each logger warn once and fall silent where it raises, instead of ending the run.

    Args:
        begun: whether the run has; before, what a logger raises is a mistake in its settings, and is raised.
    """
    for logger in loggers:
        kind = type(logger)
        if not hasattr(kind, "fall_silent"):
            # A subclass, not a wrapper: callbacks ask what kind of logger one is.
            logger.__class__ = _outlived(kind)
        vars(logger).update(_run_has_begun=begun, _is_silent=False)


@contextmanager
def outliving(logger: Logger) -> Iterator[None]:
    """Around what is asked of a logger's `experiment`: a logger of `outlive` falls silent where that raises."""
    try:
        yield
    except Exception as error:
        if not hasattr(logger, "fall_silent"):
            raise
        logger.fall_silent(error)


def _outlived(kind: type[Logger]) -> type[Logger]:
    """The same kind of logger, whose calls fall silent instead of raising."""
    calls: dict[str, Any] = {name: _call(getattr(kind, name)) for name in _CALLS if hasattr(kind, name)}
    if hasattr(kind, "experiment"):
        experiment = _call(_without_arguments(kind.experiment.__get__), otherwise=DummyExperiment)
        calls["experiment"] = property(experiment)
    return type(kind.__name__, (kind,), {**calls, "fall_silent": _fall_silent})


def _call(method: Callable[..., Any], *, otherwise: Callable[[], Any] = lambda: None) -> Callable[..., Any]:
    """The method, or what `otherwise` gives where that raises, and ever after."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_silent:
            return otherwise()
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.fall_silent(error)
        return otherwise()

    return call


def _without_arguments(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, called where no command line is to be seen: W&B keeps it as typed, credentials too."""

    def call(*args: Any) -> Any:
        typed, sys.argv = sys.argv, sys.argv[:1]
        try:
            return method(*args)
        finally:
            sys.argv = typed

    return call


def _fall_silent(self: Any, error: Exception) -> None:
    if not self._run_has_begun():
        raise error
    self._is_silent = True
    line = " ".join(f"{type(self).__name__}: {type(error).__name__}: {error}".split())
    warnings.warn(f"{line}; it logs no more, training goes on", stacklevel=3)
