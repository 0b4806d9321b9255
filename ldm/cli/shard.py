"""`ldm shard`: writes a dataset as WebDataset shards into a run folder."""

from __future__ import annotations

import errno
import inspect
import time
from collections.abc import Sequence
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig

from ldm.cli.build import build
from ldm.cli.chain import run_chain, shown
from ldm.cli.console import STORAGE, heading, say
from ldm.cli.errors import RunFailed, UserError
from ldm.cli.run_folder import RunFolder

# Seconds between two words about progress.
EVERY = 10.0
# Characters of an example.
WIDTH = 100


def shard(config: DictConfig, overrides: Sequence[str]) -> None:
    """Writes the dataset and says where it is."""
    folder = run_chain("shard", config, overrides)
    say(f"shards: {shown(folder.path)}")


def produce(folder: RunFolder) -> dict[str, Any]:
    """Calls the dataset's writer with the run folder; its answer is the summary.

    Raises:
        UserError: a setting is wrong, or there is nothing to write.
        RunFailed: the disk is full.
    """
    node = folder.config.dataset
    try:
        takes_progress = "progress" in inspect.signature(get_object(node["_target_"])).parameters
    except ImportError:  # which `build` says in a line
        takes_progress = False
    try:
        summary = build(node, folder.path, **({"progress": _Progress()} if takes_progress else {}))
    except UserError as error:
        if _is_full(error):
            raise RunFailed(f"{error}; make room, and the same command goes on where it stopped", STORAGE) from error
        raise
    _tell(summary, folder)
    return {"summary": summary}


class _Progress:
    """Says now and then how many pictures are written."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def __call__(self, written: int, dropped: int) -> None:
        now = time.monotonic()
        if now - self._told >= EVERY:
            self._told = now
            say(f"  {written:,} written, {dropped:,} dropped")


def _tell(summary: dict[str, Any], folder: RunFolder) -> None:
    """Prints how many samples there are, and a table of what was dropped and why."""
    from ldm.data.making.dropped import FILE, REASONS

    if "dropped" not in summary:
        return
    total = summary["train"] + sum(summary["dropped"].values())
    heading(f"{summary['train']:,} of {total:,} pictures written")
    for reason, count in summary["dropped"].items():
        say(f"  {reason:<18}{count:>10,}  {count / total:>6.1%}  {REASONS[reason]}")
        say(f"{'':<37} such as {summary['examples'][reason][:WIDTH]}", style="dim")
    if summary["dropped"]:
        say(f"each that was dropped: {shown(folder.path / 'train' / FILE)}")


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk, or a used-up quota, is behind an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__ or error.__context__
    return False
