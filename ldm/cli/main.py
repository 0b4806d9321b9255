"""`ldm <command> [overrides]`: the door to every command."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from ldm import __version__
from ldm.cli.console import USER_ERROR, complain

COMMANDS = {
    "train": "train an experiment, after whatever it requires",
    "sample": "make pictures from prompts, and from pictures",
    "evaluate": "measure a trained model",
    "shard": "write a dataset as WebDataset shards",
    "convert": "turn a model of one project's format into another's",
    "encode": "turn image shards into latent shards, once and for all",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 2 a user's mistake, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"ldm {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        matches = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {matches[0]}?" if matches else ";"
        complain(f"{command}: there is no such command{hint} Commands: {', '.join(COMMANDS)}")
        return USER_ERROR
    from ldm.cli.job import run

    return run(command, rest)


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
