"""`ldm <command> [overrides]`: the door to every command."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from ldm import __version__
from ldm.cli.console import USER_ERROR, complain

COMMANDS = {
    "train": "train an experiment, after whatever it requires",
    "sweep": "try many settings of one experiment, and keep the best",
    "plan": "predict what an experiment takes on other machines: memory, time, communication, data",
    "launch": "write the file that starts a training on a cluster",
    "sample": "make pictures from prompts, and from pictures",
    "evaluate": "measure a trained model, or images",
    "compare": "put evaluations side by side on one page, and beside what a paper published",
    "papers": "published runs: what is built beside them, and what was measured",
    "reproduce": "run a published experiment, evaluate it by its protocol, and judge",
    "vote page": "make a page on which a person votes blindly between two evaluations",
    "vote count": "say what the votes of a page mean",
    "ema": "make a moving average of any length from snapshots of a run",
    "doctor": "find what is wrong with this machine before a run does",
    "shard": "write a dataset as WebDataset shards",
    "convert": "turn a model of one project's format into another's",
    "data index": "note where everything in each shard lies, and what it holds",
    "data validate": "find every fault of every shard, by shard and key",
    "data filter": "choose samples by conditions on their metadata",
    "data report": "show on one page what shards hold",
    "data encode": "turn pictures into latents and captions into text embeddings, once and for all",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 done, 1 faults found, a check failed or memory ran out, 2 a user's mistake, 3 training diverged, 4 storage
    failed, 130 interrupted by Ctrl-C, 143 by another signal.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"ldm {__version__}")
        return 0
    command, rest = split_command(arguments)
    if command not in COMMANDS:
        parts = [name for name in COMMANDS if name.startswith(f"{command} ")]
        if parts and rest[:1] in (["-h"], ["--help"]):
            print(usage())
            return 0
        matches = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {matches[0]}?" if matches else ";"
        complain(f"{command}: there is no such command{hint} Commands: {', '.join(parts or COMMANDS)}")
        return USER_ERROR
    from ldm.cli.job import run

    warnings.formatwarning = one_line
    return run(command, rest)


def one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning as its reader needs it, without the line of code that gave it."""
    return f"warning: {message}\n"


def split_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command, of two words where its first word alone is none (`ldm data index`), and the rest."""
    first, *rest = arguments
    if rest and any(name.startswith(f"{first} ") for name in COMMANDS) and rest[0][:1].isalpha() and "=" not in rest[0]:
        return f"{first} {rest[0]}", rest[1:]
    return first, rest


def usage() -> str:
    """The text of `ldm --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {phrase}" for name, phrase in COMMANDS.items()]
    return "\n".join(
        [
            "ldm: train, sample and evaluate latent diffusion models",
            "",
            "usage: ldm <command> [group=option] [key=value] [-m] [--cfg job] [--config-dir FOLDER]",
            "",
            *lines,
            "",
            "`ldm <command> --help` lists a command's groups and settings.",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
