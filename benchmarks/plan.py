"""Published training throughput beside what `ldm plan` predicts for it.

    python benchmarks/plan.py [FILE.md]

Prints the table, and writes it as Markdown where a file is named. No GPU is used: everything is counted.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ldm.cli.plan_published import compare, encoding_ratio, errors
from ldm.cli.plan_report import markdown


def main(arguments: list[str]) -> None:
    """Compares, and prints or writes."""
    found = compare()
    middle, worst = errors(found)
    text = "\n".join(
        [
            markdown(found),
            "",
            f"Rows that nothing was fitted on: median error {middle:.0%}, largest {worst:.0%}.",
            "Time with pictures and text encoded while training over both precomputed, on 8 A100: published 1.4; "
            f"predicted {encoding_ratio(256):.2f} (256 px) and {encoding_ratio(512):.2f} (512 px).",
        ]
    )
    print(text)
    if arguments:
        Path(arguments[0]).write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
