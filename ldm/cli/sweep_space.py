"""What a sweep searches: ranges and choices by override key, read from yaml and drawn by an Optuna trial."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.cli.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import optuna

# What a range may say.
FIELDS = ("low", "high", "log", "step")
# Text that Hydra reads as it stands; null, true and numbers would become something else.
_PLAIN_TEXT = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_/][A-Za-z0-9_./:-]*", re.IGNORECASE)

Value = bool | int | float | str | None


@dataclass(frozen=True)
class Choice:
    """One of several values: `sampler: [ddim, dpmpp_2m]`.

    Args:
        key: the override's key, or a config group.
        values: numbers, text, true, false, null, or JSON of a list.
    """

    key: str
    values: tuple[Value, ...]

    def suggest(self, trial: optuna.trial.Trial) -> Value:
        """What the study draws for this trial; the same for a trial that has it already."""
        return trial.suggest_categorical(self.key, self.values)

    @property
    def examples(self) -> tuple[Value, ...]:
        """Values to check the key with."""
        return self.values


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both included; whole ones where both bounds are.

    Args:
        key: the override's key.
        low: the smallest.
        high: the largest.
        log: draw the logarithm evenly.
        step: draw multiples of it above `low` alone; None = any.
    """

    key: str
    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high") if self.step is None else ("low", "high", "step"):
            if not _is_number(getattr(self, name)):
                raise UserError(f"space: {self.key}: {name}: got {getattr(self, name)!r}, expected a number")
        if not isinstance(self.log, bool):
            raise UserError(f"space: {self.key}: log: got {self.log!r}, expected true or false")
        if not self.low < self.high:
            raise UserError(f"space: {self.key}: got low={self.low} and high={self.high}, expected low < high")
        if self.log and self.low <= 0:
            raise UserError(f"space: {self.key}: got low={self.low} with log: true, expected low > 0")
        if self.log and self.step is not None:
            raise UserError(f"space: {self.key}: got both log and step, expected one of them; leave out one")
        if self.step is not None and self.step <= 0:
            raise UserError(f"space: {self.key}: step: got {self.step}, expected more than 0")

    @property
    def is_whole(self) -> bool:
        """Whether whole numbers are drawn."""
        return all(isinstance(bound, int) for bound in (self.low, self.high, self.step or 1))

    def suggest(self, trial: optuna.trial.Trial) -> Value:
        """What the study draws for this trial; the same for a trial that has it already."""
        if self.is_whole:
            return trial.suggest_int(self.key, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)

    @property
    def examples(self) -> tuple[Value, ...]:
        """Values to check the key with."""
        return (self.low,)


Parameter = Choice | Range


def read_space(node: Mapping[str, Any] | None) -> list[Parameter]:
    """The parameters of a `space` node: dotted keys, or keys within keys, down to a list or to low and high.

    Raises:
        UserError: there is none, or one is wrong; got, expected, remedy.
    """
    found = list(_parameters(node or {}))
    if not found:
        raise UserError(
            "space: got nothing to search; choose space=NAME, or write it: "
            "'+space.optimizer.lr={low: 1e-5, high: 1e-3, log: true}'"
        )
    keys = [parameter.key for parameter in found]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"space: {key}: got it twice; leave out one")
    return found


def override(key: str, value: Value) -> str:
    """`key=value` as Hydra reads it."""
    return f"{key}={_written(value)}"


def check_free(parameters: Sequence[Parameter], overrides: Sequence[str]) -> None:
    """Refuses a key that the command line fixes and the space searches.

    Raises:
        UserError: there is such a key.
    """
    fixed = {item.lstrip("+~").partition("=")[0] for item in overrides}
    for parameter in parameters:
        if parameter.key.lstrip("+") in fixed:
            raise UserError(f"space: {parameter.key}: got it on the command line too; leave it out of one of them")


def _parameters(node: Mapping[str, Any], prefix: str = "") -> Iterator[Parameter]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and not _is_range(value):
            yield from _parameters(value, f"{key}.")
        else:
            yield _parameter(key, value)


def _is_range(node: Mapping[str, Any]) -> bool:
    """Whether a node is a range, or one with a slip of the pen, rather than keys within keys."""
    return any(name in FIELDS for name in node) or not any(isinstance(value, Mapping | list) for value in node.values())


def _parameter(key: str, value: Any) -> Parameter:
    if isinstance(value, list):
        return Choice(key, _choices(key, value))
    if not isinstance(value, Mapping):
        raise UserError(
            f"space: {key}: got {value!r}, expected [a, list, of, choices] or {{low: 1e-5, high: 1e-3, log: true}}"
        )
    for name in value:
        if name not in FIELDS:
            hint = did_you_mean(str(name), list(FIELDS)) or f"; expected {', '.join(FIELDS)}"
            raise UserError(f"space: {key}: a range has no {name!r}{hint}")
    for name in ("low", "high"):
        if name not in value:
            raise UserError(f"space: {key}: {name} is missing; write {{low: 1e-5, high: 1e-3}}")
    return Range(key, **value)


def _choices(key: str, values: list[Any]) -> tuple[Value, ...]:
    if len(values) < 2:
        raise UserError(f"space: {key}: got {len(values)} choices, expected at least 2; fix it with {key}=... instead")
    if any(isinstance(value, Mapping) for value in values):
        raise UserError(f"space: {key}: got a mapping as a choice, expected numbers, text or lists; search its keys")
    made = tuple(json.dumps(value) if isinstance(value, list) else value for value in values)
    if len({repr(value) for value in made}) < len(made):
        raise UserError(f"space: {key}: got a choice twice in {values}; leave out one")
    return made


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _written(value: Value) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if not isinstance(value, str):
        return repr(value)
    if value.startswith("[") or _PLAIN_TEXT.fullmatch(value):
        return value
    escaped = re.sub(r"\\+(?='|$)", lambda match: 2 * match[0], value).replace("'", r"\'")
    return f"'{escaped}'"
