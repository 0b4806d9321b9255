"""Trains every paper card in miniature on this machine's CPU, in one process: `python benchmarks/papers.py [CARD ...]`.

What a card requires is trained before it, once for all of them. Writes benchmarks/results/papers.md when all cards ran.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

from ldm.cli.main import main

CARDS = Path(__file__).parents[1] / "conf/experiment/paper"
RESULT = Path(__file__).parent / "results/papers.md"


def run(name: str) -> tuple[int, float]:
    """(exit code, seconds) of a card's training in miniature."""
    started = time.monotonic()
    code = main(["train", f"experiment=paper/{name}", "+scale=tiny"])
    return code, time.monotonic() - started


def report(rows: dict[str, tuple[int, float]]) -> str:
    """The table as markdown."""
    head = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = [
        f"# Paper cards in miniature (`+scale=tiny`): {head}",
        "",
        "| card | exit code | seconds |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {code} | {seconds:.1f} |" for name, (code, seconds) in rows.items()]
    total = sum(seconds for _, seconds in rows.values())
    return "\n".join([*lines, "", f"{len(rows)} cards in {total:.0f} s, what they require included.", ""])


if __name__ == "__main__":
    names = sys.argv[1:] or sorted(file.stem for file in CARDS.glob("*.yaml"))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rows = {name: run(name) for name in names}
    failed = [name for name, (code, _) in rows.items() if code]
    text = report(rows)
    print(text)
    if not sys.argv[1:]:
        RESULT.write_text(text)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
