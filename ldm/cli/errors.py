"""A user's mistakes become one line and exit code 2; everything else stays a traceback."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_object
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

# Packages that an extra installs, by the name they are imported under.
EXTRAS = {"torch_fidelity": "metrics", "wandb": "wandb", "optuna": "sweep", "submitit": "slurm"}


class UserError(Exception):
    """A mistake of the user's, said in one line: got, expected, remedy."""


class RunFailed(Exception):
    """A run could not go on, and whose fault it is shows in the exit code; said in one line.

    Args:
        line: what happened, and what to do.
        code: the exit code.
        alone: whether one rank says so, whichever it is; else all know it and the first one says it.
    """

    def __init__(self, line: str, code: int, *, alone: bool = False) -> None:
        super().__init__(line)
        self.code, self.alone = code, alone


class Interrupted(KeyboardInterrupt):
    """A signal other than Ctrl-C's stopped the run; as with Ctrl-C, a chain or a sweep ends with it."""


@contextmanager
def user_mistakes() -> Iterator[None]:
    """Turns what a wrong setting raises while something is composed or built into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        line = mistake(error)
        if line is None:
            raise
        raise UserError(line) from error


def mistake(error: BaseException) -> str | None:
    """The one line for a user's mistake, or None where the error is ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, InstantiationException):
        return _instantiation_mistake(error)
    if isinstance(error, OmegaConfBaseException):
        return _config_mistake(error)
    if isinstance(error, ModuleNotFoundError):
        return _missing_package(error)
    if type(error).__module__.startswith("wandb."):
        return f"{one_line(error)} Or keep the run on this machine: logger.wandb.offline=true"
    known = isinstance(error, ValueError | OSError | HydraException | YAMLError)
    # As W&B's above, Lightning's own exception is named rather than imported: importing Lightning takes seconds.
    if known or type(error).__name__ == "MisconfigurationException":
        return one_line(error)
    return None


def one_line(error: BaseException) -> str:
    """The error's text without line breaks."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def closest(word: str, words: list[str], *, cutoff: float = 0.6) -> str | None:
    """The most similar of the words, or None where nothing is near."""
    matches = difflib.get_close_matches(word, words, n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(word: str, words: list[str]) -> str:
    """`"; did you mean X?"`, or nothing where no word is near."""
    match = closest(word, words)
    return f"; did you mean {match}?" if match else ""


def _instantiation_mistake(error: InstantiationException) -> str:
    place = re.search(r"full_key: (\S+)", str(error))
    target = re.search(r"target '([\w.]+)'", str(error))
    cause: BaseException = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    prefix = f"{place[1]}: " if place else ""
    if target and str(error).startswith("Error locating target"):
        reason = _missing_package(cause) if isinstance(cause, ModuleNotFoundError) else None
        return f"{prefix}{reason or f'cannot import {target[1]}; check its spelling (LDM_TRACEBACK=1 shows why)'}"
    if isinstance(cause, InstantiationException):
        return prefix + one_line(cause).removesuffix(f"full_key: {place[1]}" if place else "").strip()
    if isinstance(cause, TypeError) and target:
        return prefix + call_mistake(cause, target[1])
    return prefix + (mistake(cause) or f"{type(cause).__name__}: {one_line(cause)} (LDM_TRACEBACK=1 shows where)")


def call_mistake(error: TypeError, target: str) -> str:
    """Names the argument that a constructor does not take or lacks."""
    text = one_line(error)
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unexpected:
        parameters = list(inspect.signature(get_object(target)).parameters)
        return f"{target} takes no {unexpected[1]!r}{did_you_mean(unexpected[1], parameters)}"
    missing = re.search(r"missing \d+ required .*arguments?: (.+)", text)
    if missing:
        return f"{target} needs {missing[1]}; set it in the config"
    return f"TypeError: {text} (a value of the wrong type? LDM_TRACEBACK=1 shows where)"


def _config_mistake(error: OmegaConfBaseException) -> str:
    key = error.full_key or ""
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value; set it with {key}=..."
    text = str(error.msg or error).split("\n    full_key:")[0]
    text = re.sub(r"^\w+ raised while resolving interpolation: ", "", " ".join(text.split()))
    return f"{key}: {text}" if key else text


def _missing_package(error: ModuleNotFoundError) -> str | None:
    package = (error.name or "").partition(".")[0]
    if not package:
        package = next((extra for extra in EXTRAS if extra in str(error)), "")
    if package not in EXTRAS:
        return None
    return f"the package {package} is not installed; install it with: pip install 'ldm[{EXTRAS[package]}]'"
