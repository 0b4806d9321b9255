"""A row of the fault matrix: what is injected, what must hold, and what was found."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.faults.bench_child import Setting


@dataclass(frozen=True)
class Result:
    """What a row's injection found.

    Args:
        held: whether what must hold held.
        figure: the row's figure, in a few words.
        details: for the JSON.
    """

    held: bool
    figure: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One fault.

    Args:
        number: as in the matrix, 1 to 36.
        fault, must_hold: in words.
        stock: what Lightning 2.6.6 and webdataset 1.0.2 did, where that was measured.
        run: injects it.
    """

    number: int
    fault: str
    must_hold: str
    stock: str
    run: Callable[[Setting], Result]


ROWS: dict[int, Row] = {}


def row(number: int, fault: str, *, must_hold: str, stock: str = "") -> Callable[..., Callable[[Setting], Result]]:
    """Registers a function that injects the fault of a row."""

    def register(run: Callable[[Setting], Result]) -> Callable[[Setting], Result]:
        assert number not in ROWS, number
        ROWS[number] = Row(number, fault, must_hold, stock, run)
        return run

    return register


def run_row(entry: Row, setting: Setting) -> dict[str, Any]:
    """Injects one row's fault; an error in doing so is a miss. What is found is ready for JSON."""
    started, processor = time.monotonic(), os.times()
    try:
        result = entry.run(setting)
    except Exception as error:
        lines = traceback.format_exception(error)
        result = Result(False, f"not injected: {type(error).__name__}: {error}"[:300], {"traceback": lines[-6:]})
    seconds = round(time.monotonic() - started, 1)
    now = os.times()
    # Of this process and of all that it has waited for.
    used = round(sum(now[:4]) - sum(processor[:4]), 1)
    machine = {"processor_seconds": used, "load": round(os.getloadavg()[0], 1)}
    facts = {name: value for name, value in vars(entry).items() if name != "run"}
    return {**facts, **asdict(result), "seconds": seconds, **machine}


def shares(values: Iterable[bool]) -> str:
    """`19/20`."""
    listed = list(values)
    return f"{sum(listed)}/{len(listed)}"
