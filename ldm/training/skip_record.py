"""Which steps were left out: kept in the run folder, so that a run that goes on leaves out the same ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Skip:
    """One step whose batch changed nothing.

    Args:
        step: optimizer steps before it.
        reason: "not finite", "spike" or "jumped over".
        values: the loss, then the gradient norm of each optimizer; empty where it was jumped over.
        positions: the batch's first place in the run's stream of samples and the one behind its last, where known.
    """

    step: int
    reason: str
    values: tuple[float, ...] = ()
    positions: tuple[int, int] | None = None

    @property
    def in_words(self) -> str:
        """What made it stand out."""
        if not self.values:
            return self.reason
        loss, *norms = self.values
        return f"loss {loss:.4g}, gradient norm {', '.join(f'{norm:.4g}' for norm in norms)} ({self.reason})"

    def to_plain(self) -> dict[str, Any]:
        """For JSON and checkpoints: numbers that are not finite become words."""
        values = [value if abs(value) < float("inf") else str(value) for value in self.values]
        return {"step": self.step, "reason": self.reason, "values": values, "positions": self.positions}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Skip:
        """The inverse of `to_plain`."""
        positions = plain["positions"]
        values = tuple(float(value) for value in plain["values"])
        return cls(plain["step"], plain["reason"], values, (positions[0], positions[1]) if positions else None)


class SkipRecord:
    """The skipped steps of a run in `path`, a line of JSON each, and its rollbacks and aborts between them.

    Attributes:
        lines: of the file, in order: what a checkpoint keeps.
        skips: by step.
        settled: steps that an abort or a rollback has answered; they stay left out and count no more.
        rollbacks: (the step that training was at, the step that it went back to), since the last abort.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.lines: list[dict[str, Any]] = []
        self.skips: dict[int, Skip] = {}
        self.settled: set[int] = set()
        self.rollbacks: list[tuple[int, int]] = []

    def read(self) -> list[dict[str, Any]]:
        """The file's whole lines; a kill may leave the last one without its end."""
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def take_up(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Adds what the lines of a file or of a checkpoint say."""
        for line in lines:
            self.lines.append(dict(line))
            if "step" in line:
                self.skips.setdefault(line["step"], Skip.from_plain(line))
                continue
            self.settled |= set(self.skips)
            if line["event"] == "rollback":
                self.rollbacks.append((line["at"], line["to"]))
            else:
                self.rollbacks = []

    def add(self, skips: Iterable[Skip], *, write: bool) -> None:
        """Takes in steps that are new, on every process; one of them writes."""
        new = [skip.to_plain() for skip in skips if skip.step not in self.skips]
        self.take_up(new)
        if write and new:
            self._append(new)

    def settle(self, event: Mapping[str, Any], *, write: bool) -> None:
        """Notes an abort or a rollback: the steps left out so far count no more."""
        self.take_up([event])
        if write:
            self._append([event])

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
