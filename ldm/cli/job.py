"""Runs a command under Hydra and says a user's mistakes in one line each."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.cli.compose import checked, conf_folder, config_name, explain_after_shutdown, group_options
from ldm.cli.console import INTERRUPTED, PREEMPTED, USER_ERROR, complain, heading, rank
from ldm.cli.errors import Interrupted, RunFailed, UserError
from ldm.cli.provenance import redact_override

# A prompt may hold any sign; these are quoted for Hydra's grammar, which gives commas and brackets a meaning.
TEXT_KEYS = (
    *("prompt", "negative_prompt", "prompt_file", "to", "image", "mask", "depth", "out", "checkpoint"),
    *("source", "config", "base", "run", "shards", "launcher"),
)
# The last part of keys that hold a condition, which is text too: filter.where, filters.mine.where.
CONDITION = "where"


def run(command: str, arguments: list[str]) -> int:
    """Hands the arguments to Hydra; returns the exit code."""
    OmegaConf.register_new_resolver("options", lambda group: ", ".join(group_options(group)), replace=True)
    options, overrides = _split(arguments)
    job = _Job(command)
    try:
        with _arguments(arguments if options.multirun else [quote(item) for item in arguments]):
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=config_name(command))(job)()
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        if job.started or _wants_traceback():
            raise
        complain(explain_after_shutdown(error, command, overrides, config_dir=options.config_dir))
        return USER_ERROR
    except KeyboardInterrupt as interrupt:
        # Lightning kills everything when a process that it started itself ends with another code than 0.
        return 0 if rank() else PREEMPTED if isinstance(interrupt, Interrupted) else INTERRUPTED
    return job.code


def quote(argument: str) -> str:
    """Quotes the value of a free-text override, unless it is quoted or null already."""
    key, equals, value = argument.partition("=")
    is_condition = key.rpartition(".")[2] == CONDITION
    if not (key in TEXT_KEYS or is_condition) or not equals or value in ("", "null") or value[0] in "'\"":
        return argument
    if value[0] == "[" and (is_condition or key == "shards"):
        return argument  # a list, in Hydra's own writing
    # In Hydra's grammar backslashes count only before a quote, where they double.
    escaped = re.sub(r"\\+(?='|$)", lambda match: 2 * match[0], value).replace("'", r"\'")
    return f"{key}='{escaped}'"


class _Job:
    """The function that Hydra calls with a composed config: once, or once a job of a sweep."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.started = False
        self.code = 0
        self._typed = list(sys.argv)

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
        try:
            config = checked(self.command, config, overrides, choices=settings.runtime.choices)
            module, _, name = self.command.partition(" ")
            getattr(import_module(f"ldm.cli.{module}"), name or module)(config, overrides)
        except UserError as error:
            if _wants_traceback():
                raise
            complain(str(error))
            self.code = USER_ERROR
        except RunFailed as error:
            if _wants_traceback():
                raise
            if rank() == 0:
                complain(str(error))
                self.code = error.code


def _split(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's own options that matter here, and the overrides."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--cfg", "-c")
    parser.add_argument("--multirun", "-m", action="store_true")
    options, rest = parser.parse_known_args(list(arguments))
    return options, [item for item in rest if not item.startswith("-")]


@contextmanager
def _arguments(arguments: Sequence[str]) -> Iterator[None]:
    """Lets Hydra's entry point see these arguments, which it reads from sys.argv, and raise its errors."""
    typed, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        # A sweep writes a file into its folder, whether anyone wants it or not.
        with TemporaryDirectory(prefix="ldm-") as scratch:
            sys.argv = [typed[0], *arguments, f"hydra.sweep.dir={scratch}"]
            yield
    finally:
        sys.argv = typed
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _wants_traceback() -> bool:
    return os.environ.get("LDM_TRACEBACK") == "1"
