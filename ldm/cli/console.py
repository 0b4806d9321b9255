"""What the commands say: one console, silent on every rank but the first."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Exit codes: faults in the data, a user's mistake, diverged, storage failed, Ctrl-C, stopped by another signal.
DATA_FAULTS, USER_ERROR, DIVERGED, STORAGE, INTERRUPTED, PREEMPTED = 1, 2, 3, 4, 130, 143
# Of `ldm doctor`, and of ranks that are not what they should be.
CHECK_FAILED = 1

_OUT = Console(highlight=False, soft_wrap=True)
_ERR = Console(highlight=False, soft_wrap=True, stderr=True)


def rank() -> int:
    """This process's number among those that a launcher started together (0 without a launcher)."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def say(line: str, *, style: str = "") -> None:
    """Prints a line on standard output, from rank 0 alone."""
    if rank() == 0:
        _OUT.print(Text(line, style=style))


def heading(line: str) -> None:
    """Prints a line that begins a part of the work."""
    say(line, style="bold")


def complain(line: str) -> None:
    """Prints a one-line error on standard error, without credentials."""
    from ldm.cli.provenance import hide_values

    _ERR.print(Text.assemble(("error: ", "bold red"), hide_values(line)))


def show(table: Table) -> None:
    """Prints a table on standard output, from rank 0 alone; at its full width where no terminal limits it."""
    if rank() == 0:
        # A console's own width is a limit that `print` cannot raise.
        console = _OUT if _OUT.is_terminal else Console(highlight=False, width=240)
        console.print(table)
