"""Runs a command under Hydra and says a user's mistakes in one line each."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.cli.compose import checked, conf_folder, config_name, explain_after_shutdown, group_options
from ldm.cli.console import INTERRUPTED, PREEMPTED, USER_ERROR, complain, heading, rank, say
from ldm.cli.errors import Interrupted, RunFailed, UserError
from ldm.cli.job_elsewhere import gather, sweep_folder, telling
from ldm.cli.plan import as_plan, asks_for_memory
from ldm.cli.provenance import redact_override

# A prompt may hold any sign; these are quoted for Hydra's grammar, which gives commas and brackets a meaning.
TEXT_KEYS = (
    *("prompt", "negative_prompt", "prompt_file", "to", "image", "mask", "depth", "out", "checkpoint"),
    *("source", "config", "base", "run", "shards", "launcher", "evaluations", "votes", "key", "card"),
    *("images", "reference", "prompts", "reconstruct", "setup", "install", "guidance.guide", "guidance.classifier"),
)
# Of these, the keys that may hold a list as well.
LIST_KEYS = ("shards", "evaluations", "votes")
# Commands of a paper, by what their first word means.
BARE_WORDS = {"papers": "name=", "reproduce": "experiment="}
# What is typed as a flag, and the setting that it is.
FLAGS = {("papers", "--check"): "check=true", ("doctor", "--faults"): "faults=true", ("plan", "--check"): "check=true"}
# Hydra's options that are followed by a word.
WITH_WORDS = ("--config-dir", "-cd", "--cfg", "-c", "--package", "-p", "--config-name", "-cn", "--config-path", "-cp")
# Hydra's options that a value follows.
WITH_VALUE = (
    *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c", "--package", "-p"),
    *("--info", "-i", "--experimental-rerun"),
)
# How long the other ranks leave it to the first one to say a mistake.
FIRST_RANK_SECONDS = 3.0
# Commands that leave finished pieces behind; `ldm train` and `ldm sweep` say themselves how they go on.
GOING_ON = ("shard", "data encode", "evaluate")
# The last part of keys that hold a condition, which is text too: filter.where, filters.mine.where.
CONDITION = "where"


def run(command: str, arguments: list[str]) -> int:
    """Hands the arguments to Hydra; returns the exit code."""
    OmegaConf.register_new_resolver("options", lambda group: ", ".join(group_options(group)), replace=True)
    arguments = [named(command, grouped(command, item), before) for before, item in pairwise(["", *arguments])]
    if asks_for_memory(command, arguments):
        command, arguments = "plan", as_plan(arguments)
    options, overrides = _split(arguments)
    job = _Job(command)
    try:
        with _arguments(arguments if options.multirun else [quote(item) for item in arguments], job) as folder:
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=config_name(command))(job)()
            gather(job, folder)
            job.conclude()
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        if job.started or _wants_traceback():
            raise
        _complain_once(explain_after_shutdown(error, command, overrides, config_dir=options.config_dir))
        return USER_ERROR
    except KeyboardInterrupt as interrupt:
        if command in GOING_ON and rank() == 0:
            say("stopped; the same command goes on from here")
        # Lightning kills everything when a process that it started itself ends with another code than 0.
        return 0 if rank() else PREEMPTED if isinstance(interrupt, Interrupted) else INTERRUPTED
    return job.code


def quote(argument: str) -> str:
    """Quotes the value of a free-text override, unless it is quoted or null already."""
    key, equals, value = argument.partition("=")
    is_condition = key.rpartition(".")[2] == CONDITION
    if not (key in TEXT_KEYS or is_condition) or not equals or value in ("", "null") or value[0] in "'\"":
        return argument
    if value[0] in "[{" and (is_condition or key in LIST_KEYS):
        return argument  # a list or a dict, in Hydra's own writing
    # In Hydra's grammar backslashes count only before a quote, where they double.
    escaped = re.sub(r"\\+(?='|$)", lambda match: 2 * match[0], value).replace("'", r"\'")
    return f"{key}='{escaped}'"


def grouped(command: str, argument: str) -> str:
    """`metrics=[fid,is]` of `ldm evaluate` as the choice of a group that it is, metric=[fid,inception_score].

    `+callback=[is]` of `ldm train` means the inception score too.
    """
    key, _, value = argument.partition("=")
    group = {("evaluate", "metrics"): "metric", ("train", "callback"): "callback"}.get((command, key.lstrip("+")))
    if group is None:
        return argument
    return f"{'+' * key.startswith('+')}{group}=" + re.sub(r"(?<![\w])is(?![\w])", "inception_score", value)


def named(command: str, argument: str, before: str) -> str:
    """A bare word of `ldm papers` as the card that it names, of `ldm reproduce` as its experiment; a flag as a setting.

    Args:
        before: the argument before it, which may want a word for itself.
    """
    if (command, argument) in FLAGS:
        return FLAGS[command, argument]
    is_bare = argument[:1].isalnum() and "=" not in argument and before not in WITH_WORDS
    if command not in BARE_WORDS or not is_bare:
        return argument
    return BARE_WORDS[command] + (argument if command == "papers" or "/" in argument else f"paper/{argument}")


class _Job:
    """The function that Hydra calls with a composed config: once, or once a job of a sweep."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.started = False
        self.code = 0
        self.lines: list[str] = []
        self.results: list[Any] = []
        self._typed = list(sys.argv)
        self._process = os.getpid()

    def __call__(self, config: DictConfig) -> None:
        """Runs the command; a user's mistake, or a run that failed, is said and remembered, so that a sweep goes on."""
        # Lightning starts the other ranks with sys.argv, which therefore is what the user typed again.
        sys.argv = self._typed
        self.started = True
        settings = HydraConfig.get()
        # Read as they stand: an override may hold an interpolation that means something in the config alone.
        overrides: list[str] = cast(list[str], OmegaConf.to_container(settings.overrides.task, resolve=False))
        if settings.mode == RunMode.MULTIRUN:
            heading(f"job {settings.job.num}: {shlex.join([self.command, *map(redact_override, overrides)])}")
        is_elsewhere = os.getpid() != self._process
        with telling(self, Path(settings.sweep.dir), settings.job.num) if is_elsewhere else nullcontext():
            self._run(config, overrides, choices=settings.runtime.choices)

    def _run(self, config: DictConfig, overrides: list[str], *, choices: Mapping[str, Any]) -> None:
        try:
            config = checked(self.command, config, overrides, choices=choices)
            module, _, name = self.command.partition(" ")
            result = getattr(import_module(f"ldm.cli.{module}"), name or module)(config, overrides)
            self.results += [] if result is None else [result]
        except UserError as error:
            if _wants_traceback():
                raise
            _complain_once(str(error))
            self._failed(str(error), USER_ERROR)
        except RunFailed as error:
            if _wants_traceback():
                raise
            if rank() == 0 or error.alone:
                complain(str(error))
                self._failed(str(error), error.code)

    def conclude(self) -> None:
        """Hands what the jobs of a sweep returned to the command's `conclude_COMMAND`, where it has one."""
        if len(self.results) < 2:
            return
        module, _, name = self.command.partition(" ")
        conclude = getattr(import_module(f"ldm.cli.{module}"), f"conclude_{name or module}", None)
        if conclude is not None:
            try:
                conclude(self.results)
            except UserError as error:
                complain(str(error))
                self._failed(str(error), USER_ERROR)

    def _failed(self, line: str, code: int) -> None:
        self.code, self.lines = code, [*self.lines, line]


def _complain_once(line: str) -> None:
    """Says a mistake that all ranks make alike: the first one at once, on which a launcher ends the others."""
    if rank():
        time.sleep(FIRST_RANK_SECONDS)
    complain(line)


def _split(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's own options that matter here, and the overrides."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--cfg", "-c")
    parser.add_argument("--multirun", "-m", action="store_true")
    options, rest = parser.parse_known_args(list(arguments))
    return options, [item for item in rest if not item.startswith("-")]


def options_first(arguments: Sequence[str]) -> list[str]:
    """Hydra's own options before the overrides, which its parser takes in one piece only; each in their order."""
    options: list[str] = []
    overrides: list[str] = []
    for before, item in pairwise(["", *arguments]):
        is_option = item.startswith("-") or (before in WITH_VALUE and not (before in ("--info", "-i") and "=" in item))
        (options if is_option else overrides).append(item)
    return [*options, *overrides]


@contextmanager
def _arguments(arguments: Sequence[str], job: _Job) -> Iterator[Path]:
    """Lets Hydra's entry point see these arguments, which it reads from sys.argv, and raise its errors; yields the
    folder of a sweep, into which it writes whether anyone wants it or not.
    """
    typed, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with sweep_folder(arguments, job) as folder:
            sys.argv = [typed[0], *options_first(arguments), f"hydra.sweep.dir='{folder}'"]
            yield folder
    finally:
        sys.argv = typed
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _wants_traceback() -> bool:
    return os.environ.get("LDM_TRACEBACK") == "1"
