"""The bad samples of a run: each once in bad_samples.jsonl, and an end of training where there are too many."""

import fcntl
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ldm.data.faults import KINDS, Fault

FILE = "bad_samples.jsonl"
# Below so many samples read, the share of bad ones is taken of this number: one bad sample is no trend.
LEAST = 1000
MAX_WORST = 3


class BadDataError(ValueError):
    """Data are too bad to be trained on; says how bad, where most, and what to do."""


class Ledger:
    """The bad samples that were met, kept in a file that all processes of a run share.

    A line is {"shard", "key", "kind", "reason", "split", "position"}; the key is "" for a whole shard, and the
    position, null for what indexing found, is the place in the stream at which the sample was met first. A run that
    goes on, another rank or another epoch adds no second line for the same sample.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, *, max_bad_fraction: float) -> None:
        """Without a folder, or one that is not there, bad samples are only counted.

        Raises ValueError for a fraction outside [0, 1].
        """
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction: got {max_bad_fraction}, expected 0 to 1")
        self.max_bad_fraction = max_bad_fraction
        self.path = Path(folder) / FILE if folder is not None and Path(folder).is_dir() else None
        self.lines: dict[tuple[str, str], dict[str, Any]] = {}
        self._read_bytes = 0
        # Of training: bad samples that were met while reading, and what is bad by the index of all of them.
        self._num_met = self._num_indexed = 0
        self.refresh()

    def refresh(self) -> None:
        """Take in what other processes wrote since."""
        if self.path is not None and self.path.is_file():
            self._exclusively(lambda file: None)

    def add(self, faults: Iterable[Fault], *, split: str, position: int | None = None) -> None:
        """Note faults, those that are new; warn at the first, the tenth, the hundredth and so on."""
        rows = {(fault.shard, fault.key): _row(fault, split, position) for fault in faults}
        if not rows.keys() - self.lines.keys():
            return
        before = len(self.lines)
        if self.path is None:
            self._take_in(rows)
        else:
            self._exclusively(lambda file: self._append(file, rows))
        if len(str(before)) < len(str(len(self.lines))) or not before:
            last = next(reversed(self.lines.values()))
            where = f"; listed in {self.path}" if self.path else ""
            warnings.warn(
                f"data: {len(self.lines)} bad samples or shards so far, the last {last['shard']}: {last['key']} "
                f"({last['reason']}){where}",
                stacklevel=2,
            )

    def is_too_bad(self, *, num_read: int, num_samples: int) -> bool:
        """Say whether of the training split, which has `num_samples` and of which `num_read` were read, too many are.

        What the index shows is a share of all samples, what reading met one of those that were read. Shards that
        `data.bad_shards=skip` left out of the index do not count: they are left out by choice.
        """
        share = self._num_met / _base(num_read, num_samples) + self._num_indexed / num_samples
        return share > self.max_bad_fraction

    def error(self, *, num_read: int, num_samples: int) -> BadDataError:
        """Return what to raise where it is too bad: the worst shards, one of their samples, and the remedy."""
        bad = [line for line in self.lines.values() if _counts(line)]
        if not bad:  # without a folder that they share, a process knows of its own alone
            return BadDataError("data: another process met too many bad samples, and names them in its own error")
        worst = Counter(line["shard"] for line in bad).most_common(MAX_WORST)
        first = next(line for line in bad if line["shard"] == worst[0][0])
        named = ", ".join(f"{shard} ({count})" for shard, count in worst)
        counts = [(self._num_met, f"{_base(num_read, num_samples):,} samples")]
        counts += [(self._num_indexed, f"{num_samples:,} in the index")]
        told = " and ".join(f"{number} bad among {what}" for number, what in counts if number)
        return BadDataError(
            f"data: got {told}, expected at most "
            f"data.max_bad_fraction={self.max_bad_fraction:g}; worst shards: {named}; such as {first['shard']}: "
            f"{first['key']}: {first['kind']} ({first['reason']}); "
            + (f"see {self.path}, " if self.path else "")
            + "write these shards again, or raise data.max_bad_fraction"
        )

    def _append(self, file: Any, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
        new = {place: row for place, row in rows.items() if place not in self.lines}
        content = b"".join(json.dumps(row).encode() + b"\n" for row in new.values())
        file.seek(self._read_bytes)
        file.truncate()  # what a killed process left without its end
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        self._read_bytes += len(content)
        self._take_in(new)

    def _take_in(self, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
        for place, row in rows.items():
            if place not in self.lines:
                self.lines[place] = row
                self._num_met += _counts(row) and row["position"] is not None
                self._num_indexed += _counts(row) and row["position"] is None

    def _exclusively(self, act: Callable[[Any], None]) -> None:
        """Hold the file against other processes, take in what they wrote since, and act."""
        assert self.path is not None
        with self.path.open("a+b") as appended:
            fcntl.flock(appended, fcntl.LOCK_EX)
            with self.path.open("r+b") as file:
                file.seek(self._read_bytes)
                content = file.read()
                whole = content[: content.rfind(b"\n") + 1]
                for line in whole.splitlines():
                    row = json.loads(line)
                    self._take_in({(row["shard"], row["key"]): row})
                self._read_bytes += len(whole)
                act(file)


def _counts(row: dict[str, Any]) -> bool:
    """Say whether a line is of something bad in training: not of a shard left out of the index, or read as it is."""
    of_a_shard = row["position"] is None and KINDS[row["kind"]].outcome in ("refused", "converted")
    return row["split"] == "train" and not of_a_shard


def _base(num_read: int, num_samples: int) -> int:
    return min(max(num_read, LEAST), num_samples)


def _row(fault: Fault, split: str, position: int | None) -> dict[str, Any]:
    return {
        "shard": fault.shard,
        "key": fault.key,
        "kind": fault.kind,
        "reason": fault.reason,
        "split": split,
        "position": position,
    }
