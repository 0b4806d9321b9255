"""Which samples to keep, by conditions on their metadata."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from ldm.data.expressions import ConditionError, Expression, Verdict, all_of, parse
from ldm.data.rows import ColumnNames, MissingColumnError

NULLS = ("keep", "drop")


class UndecidedError(ValueError):
    """A null makes a condition unknown, and nothing says what to do with it."""


@dataclass(frozen=True)
class Filter:
    """Keeps the samples for which all conditions hold.

    Args:
        where: a condition (see ldm.data.expressions), or several that must all hold and are counted one by one.
        nulls: what becomes of a sample for which they are neither true nor false, as a null decides: "keep" or
            "drop"; None refuses such a sample.
        aliases: names of the set's own, {"aesthetic": "my_score"}, besides those of ldm.data.rows.ALIASES.
        source: where the conditions are published; kept with the result.

    Raises ConditionError for a condition that cannot be read and ValueError for another choice of nulls.
    """

    where: str | Sequence[str]
    nulls: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        if self.nulls not in (None, *NULLS):
            raise ValueError(f"filter.nulls: got {self.nulls}, expected one of {', '.join(NULLS)}, or null to refuse")
        if not self.texts:
            raise ConditionError("filter.where: got no condition, expected one as in 'aesthetic >= 5'")
        if not self.columns:
            raise ConditionError(f"filter.where: got {self.texts}, expected a condition on a column")

    @property
    def texts(self) -> list[str]:
        """The conditions as they were written."""
        return [self.where] if isinstance(self.where, str) else list(self.where)

    @cached_property
    def conditions(self) -> list[Expression]:
        return [parse(text) for text in self.texts]

    @cached_property
    def columns(self) -> list[str]:
        """The columns that are asked for."""
        return sorted({name for condition in self.conditions for name in condition.columns()})

    @cached_property
    def _names(self) -> ColumnNames:
        return ColumnNames(self.aliases)

    def verdicts(self, row: Mapping[str, Any]) -> list[Verdict]:
        """Judge a row by each condition; raises MissingColumnError or ConditionError."""
        view = self._names.view(row, self.columns)
        return [condition.verdict(view) for condition in self.conditions]

    def keeps(self, row: Mapping[str, Any]) -> bool:
        """Say whether a row is kept; raises MissingColumnError, ConditionError or UndecidedError."""
        return self.decide(self.verdicts(row), row)

    def decide(self, verdicts: list[Verdict], row: Mapping[str, Any]) -> bool:
        """Say whether a row with these verdicts is kept; raises UndecidedError."""
        verdict = all_of(verdicts)
        if verdict is not None:
            return verdict
        if self.nulls is None:
            unknown = [text for text, one in zip(self.texts, verdicts, strict=True) if one is None]
            view = self._names.view(row, self.columns)
            raise UndecidedError(
                f"got {view}, for which {unknown[0]!r} is neither true nor false, expected no null; "
                "set filter.nulls=drop or filter.nulls=keep"
            )
        return self.nulls == "keep"

    def described(self) -> dict[str, Any]:
        """Return what was asked for, as json can hold it."""
        return {**asdict(self), "where": self.texts, "aliases": dict(self.aliases)}


__all__ = ["ConditionError", "Filter", "MissingColumnError", "UndecidedError"]
