"""Runs a command after the commands that it requires, each in its own run folder, skipping what is there already."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.cli.compose import compose_command, config_name, group_options, nested_options
from ldm.cli.console import heading, rank, say
from ldm.cli.errors import UserError, user_mistakes
from ldm.cli.main import split_command
from ldm.cli.provenance import redact_override
from ldm.cli.run_folder import RUN_ID_VARIABLE, RunFolder, latest_finished

# Commands that have a run folder; each module's `produce` fills it and returns the result.
PRODUCERS = ("train", "shard", "data encode")
# What torchrun and srun tell a process. Links run on rank 0 alone and must not see it.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS")


@dataclass(frozen=True)
class Link:
    """One command of a chain, composed."""

    command: str
    overrides: tuple[str, ...]
    config: DictConfig

    @property
    def title(self) -> str:
        """The command as a user types it after `ldm`."""
        return shlex.join([*self.command.split(), *map(redact_override, self.overrides)])


# Counts of a training, and the least that each may be; -1 steps are steps without end.
COUNTS = {"data.batch_size": 1, "trainer.accumulate_grad_batches": 1, "trainer.max_steps": -1}

# Of the chain under way: the folder of each link that has run or was there, and of each run found outside it.
_folders: dict[str, Path] = {}


def run_chain(command: str, config: DictConfig, overrides: Sequence[str]) -> RunFolder:
    """Runs what the config requires and then the command itself; returns the folder of the latter.

    Raises:
        UserError: a link is wrong, requires itself, or cannot be built.
    """
    register_resolver()
    _folders.clear()
    links = [*plan(config), Link(command, tuple(overrides), config)]
    for link in links:
        check_counts(link.config)
    for number, link in enumerate(links, 1):
        folder = _run_link(link, f"[{number}/{len(links)}] " if len(links) > 1 else "", is_last=link is links[-1])
        remember(folder)
    return folder


def plan(config: DictConfig) -> list[Link]:
    """What a config requires, requirements of requirements first, each once; `paths` and `inherit` hold for all."""
    found: dict[str, Link] = {}
    _collect(config, config, found, under=())
    return list(found.values())


def check_counts(config: DictConfig) -> None:
    """Refuses counts that no training has, before anything runs that it requires.

    Raises:
        UserError: there is one.
    """
    for key, least in COUNTS.items():
        with user_mistakes():
            value = OmegaConf.select(config, key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise UserError(f"{key}: got {value}, expected a whole number from {least} on")


def remember(folder: RunFolder) -> None:
    """Lets `${result:NAME}` mean this folder from here on."""
    _folders[folder.path.parent.name] = folder.path


def register_resolver() -> None:
    """Makes `${result:NAME}` mean the folder of the link NAME in this chain, else of its newest finished run."""
    OmegaConf.register_new_resolver("result", _result, replace=True)


def _collect(config: DictConfig, main: DictConfig, found: dict[str, Link], *, under: tuple[str, ...]) -> None:
    for line in config.get("requires") or []:
        if line in under:
            raise UserError(f"requires: `{line}` requires itself ({' -> '.join([*under, line])}); break the circle")
        if line in found:
            continue
        link = _compose_link(line, main)
        _collect(link.config, main, found, under=(*under, line))
        found[line] = link


def _compose_link(line: str, main: DictConfig) -> Link:
    command, overrides = split_command(shlex.split(line) or [""])
    if command not in PRODUCERS:
        raise UserError(f"requires: got `{line}`, expected one of {', '.join(PRODUCERS)} and its overrides")
    if command == "train":
        overrides += main.get("inherit") or []
    try:
        config = compose_command(command, overrides)
    except UserError as error:
        raise UserError(f"requires: `{line}`: {error}") from error
    config.paths = main.paths
    return Link(command, tuple(overrides), config)


def _run_link(link: Link, prefix: str, *, is_last: bool) -> RunFolder:
    with user_mistakes():
        folder = RunFolder.of(link.config, command=link.command, reserve=True)
    where = shown(folder.path)
    if folder.finished:
        folder.check_is_of_these_settings()
        say(f"{prefix}{link.title}: finished before, nothing to do ({where})")
        return folder
    if not is_last and rank():
        return _wait_for(folder)
    if prefix:
        heading(f"{prefix}{link.title}")
    say(f"run folder: {where}", style="dim")
    produce = import_module(f"ldm.cli.{config_name(link.command)}").produce
    hidden = () if is_last else LAUNCHER_VARIABLES
    with folder.hold(f"ldm {link.title}"), _environment(folder, hidden=hidden):
        started = time.monotonic()
        result: dict[str, Any] = produce(folder)
        folder.finish({"seconds": round(time.monotonic() - started, 1), **result})
    return folder


def _wait_for(folder: RunFolder) -> RunFolder:
    """Other ranks wait for rank 0 to run a link."""
    while not folder.finished:
        time.sleep(1)
    return folder


@contextmanager
def _environment(folder: RunFolder, *, hidden: Sequence[str]) -> Iterator[None]:
    """Lets a link see its run id and no hidden variables; what Lightning sets for the link goes with it."""
    saved = dict(os.environ)
    for name in hidden:
        os.environ.pop(name, None)
    os.environ[RUN_ID_VARIABLE] = folder.path.name
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def _result(name: str, *, _root_: DictConfig) -> str:
    """Resolves `${result:NAME}` to a path under this config's `paths.runs`."""
    runs = Path(_root_.paths.runs)
    if name not in _folders:
        found = latest_finished(runs, name=name)
        if found is None:
            raise FileNotFoundError(f"no finished run of {name} under {runs}; run `{_command_for(name)}` first")
        _folders[name] = found
    folder = _folders[name]
    return str(runs / folder.parent.name / folder.name)


def _command_for(name: str) -> str:
    """The command that most likely makes the result of this name."""
    if name in group_options("dataset"):
        return f"ldm shard dataset={name}"
    # Experiments in folders are named with an underscore.
    experiments = {option.replace("/", "_"): option for option in nested_options("experiment")}
    return f"ldm train experiment={experiments.get(name, name)}"


def shown(path: Path | str) -> str:
    """The path as seen from here, where that is shorter; the address of a remote store as it is."""
    if isinstance(path, str):
        return path
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
