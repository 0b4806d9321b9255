"""Injects every row of the fault matrix and says which held.

    python -m tests.faults.bench [--rows 1,5,11-13] [--quick] [--json FILE]

Exits with 1 where a row did not hold. Nothing is held without being injected: a row whose injection fails is a miss.
Limits of seconds are for an idle machine, and stretch with its load, which is said then. A FILE that is there already
keeps its other rows, so that the matrix can be gone through in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GROUPS = ("processes", "checkpoints", "data", "remote", "trust", "numbers", "runs")
# Of every group some, in half a minute together.
QUICK = (1, 5, 8, 14, 21, 24, 26, 29, 30, 31)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the bench; returns its exit code."""
    options = parse(arguments)
    # Set before torch is imported; forks of this process must not find threads half alive.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="offline")
    paths()
    rows, numbers = load(), options.rows or (QUICK if options.quick else range(1, 37))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        found = [inject(rows, number, Path(scratch), quick=options.quick) for number in numbers]
    seconds = time.monotonic() - started
    held = sum(one["held"] for one in found)
    used = sum(one["processor_seconds"] for one in found)
    print(f"\n{held} of {len(found)} rows held, in {seconds:.0f} s, {used:.0f} s of them on a processor")
    missed = [one["number"] for one in found if not one["held"]]
    if missed:
        print(f"missed: {', '.join(map(str, missed))}")
    if options.json:
        write(options.json, found, rows)
    return 1 if missed else 0


def write(path: Path, found: Sequence[dict[str, Any]], known: Iterable[int]) -> None:
    """Writes rows, with those that the file has from an earlier piece, as JSON, and beside it as a table."""
    earlier = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = sorted({row["number"]: row for row in (*earlier, *found)}.values(), key=lambda row: row["number"])
    summary = {
        "held": sum(row["held"] for row in rows),
        "known": sorted(known),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "processor_seconds": round(sum(row["processor_seconds"] for row in rows), 1),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}",
        "load": [min(row["load"] for row in rows), max(row["load"] for row in rows)],
        "versions": versions(),
        "rows": rows,
    }
    text = json.dumps(summary, indent=1, default=str)
    for place in (sys.prefix, str(Path.cwd())):  # which say nothing to another reader
        text = text.replace(f"{place}/", "")
    path.write_text(text + "\n")
    path.with_suffix(".md").write_text(table(summary))


def table(summary: dict[str, Any]) -> str:
    """What was found, for people."""
    packages = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    low, high = summary["load"]
    lines = [
        f"# Faults injected, {summary['date']}",
        "",
        f"`python -m tests.faults.bench --json FILE`: {summary['held']} of {len(summary['rows'])} rows held, of "
        f"{len(summary['known'])} there are, in {summary['seconds']:.0f} s, {summary['processor_seconds']:.0f} s of "
        f"them on a processor. {summary['machine']}; load between {low} and {high}; {packages}.",
        "",
        "| # | fault | must hold | found | held | s | load | stock Lightning 2.6.6 + webdataset 1.0.2 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summary["rows"]:
        cells = [row["number"], row["fault"], row["must_hold"], row["figure"], "yes" if row["held"] else "**no**"]
        cells += [row["seconds"], row["load"], row["stock"] or "not measured"]
        lines.append("| " + " | ".join(" ".join(str(cell).replace("|", "/").split()) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.bench", description="Injects the fault matrix.")
    parser.add_argument("--rows", type=numbers_of, help="numbers and ranges, 1,5,11-13; default: all, or quick's")
    parser.add_argument("--quick", action="store_true", help="some rows, with fewer trials")
    parser.add_argument("--json", type=Path, metavar="FILE", help="takes what was found, and FILE.md a table of it")
    return parser.parse_args(arguments)


def numbers_of(text: str) -> list[int]:
    """`1,5,11-13` as numbers."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    if not set(found) <= set(range(1, 37)):
        raise argparse.ArgumentTypeError(f"got {text}, expected numbers from 1 to 36")
    return found


def paths() -> None:
    """Lets the tests' own helpers be imported."""
    sys.path[:0] = [str(HERE), *(str(HERE.parent / folder) for folder in ("training", "data"))]


def load() -> dict[int, Any]:
    """All rows, and with them everything that the forks need."""
    from importlib import import_module

    import torch

    torch.set_num_threads(1)
    for name in ("faulty", "ldm.cli.train", "ldm.training.fit", "ldm.training.callbacks", "ldm.data", "ldm.generation"):
        import_module(name)
    for group in GROUPS:
        import_module(f"tests.faults.rows_{group}")
    from tests.faults.bench_row import ROWS

    return ROWS


def versions() -> dict[str, str]:
    """Of what the rows run."""
    from importlib.metadata import version

    packages = ("torch", "pytorch-lightning", "hydra-core", "webdataset", "safetensors", "fsspec", "wandb")
    return {name: version(name) for name in packages}


def inject(rows: dict[int, Any], number: int, scratch: Path, *, quick: bool) -> dict[str, Any]:
    """Injects one row and prints what was found."""
    from tests.faults.bench_child import Setting
    from tests.faults.bench_row import run_row

    setting = Setting(scratch / f"row{number}", scratch / "shared", quick=quick)
    setting.shared.mkdir(exist_ok=True)
    found = {**run_row(rows[number], setting), "quick": quick}
    print(f"{number:>2}  {'held  ' if found['held'] else 'MISSED'}  {found['fault']}  [{found['seconds']} s]")
    print(f"      must hold  {found['must_hold']}")
    print(f"      figure     {found['figure']}")
    if found["stock"]:
        print(f"      stock      {found['stock']}", flush=True)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
