"""Conditions on columns, as in `aesthetic >= 5 and not (language in ["ja", "zh"] or punsafe is null)`.

The grammar, in which a name is a column, or any text in backquotes:

    condition  = conjunction { "or" conjunction }
    conjunction = factor { "and" factor }
    factor     = "not" factor | "(" condition ")" | test
    test       = operand relation operand [ relation operand ] | name [ "not" ] "in" "[" literal { "," literal } "]"
               | name "is" [ "not" ] "null"
    relation   = "<" | "<=" | ">" | ">=" | "==" | "!="
    operand    = name | literal
    literal    = number | "text" | 'text' | true | false

A null makes a test neither true nor false but unknown, and `and`, `or` and `not` follow Kleene's logic, as in SQL.
The words may be written in capitals. Nothing is ever run as Python.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Verdict = bool | None
Value = int | float | str | bool

# Deeper nesting is no condition that anyone wrote.
MAX_DEPTH = 50
WORDS = ("and", "or", "not", "in", "is", "null", "true", "false")
RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_TOKEN = re.compile(
    r"""\s*(?:
      (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    | (?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    | `(?P<quoted>[^`]+)`
    | (?P<name>[A-Za-z_][\w.]*)
    | (?P<sign><=|>=|==|!=|[<>()\[\],])
    )""",
    re.VERBOSE,
)


class ConditionError(ValueError):
    """A condition cannot be read, or a column's value cannot be compared with what it is compared to."""


class Expression(Protocol):
    """Something that a row of columns makes true, false or, where a null decides, None."""

    def verdict(self, row: Mapping[str, Any]) -> Verdict:
        """Judge a row; raises KeyError for a column that it lacks and ConditionError for a value of another type."""

    def columns(self) -> Iterator[str]:
        """Yield the columns that are asked for, some of them twice."""


@dataclass(frozen=True)
class Column:
    """A column's name in an expression."""

    name: str


@dataclass(frozen=True)
class Comparison:
    """`left relation right`: numbers by size, texts and truth values for being equal."""

    left: Column | Value
    relation: str
    right: Column | Value

    def verdict(self, row: Mapping[str, Any]) -> Verdict:
        left, right = (_value(side, row) for side in (self.left, self.right))
        if left is None or right is None:
            return None
        name = next(side.name for side in (self.left, self.right) if isinstance(side, Column))
        if _kind(left) != _kind(right) or (_kind(left) != "a number" and self.relation not in ("==", "!=")):
            raise ConditionError(
                f"{name}: got {left!r} {self.relation} {right!r}, expected two numbers, or two texts and == or !="
            )
        return RELATIONS[self.relation](left, right)

    def columns(self) -> Iterator[str]:
        yield from (side.name for side in (self.left, self.right) if isinstance(side, Column))


@dataclass(frozen=True)
class Membership:
    """`column in [literals]`."""

    column: Column
    values: tuple[Value, ...]

    def verdict(self, row: Mapping[str, Any]) -> Verdict:
        value = _value(self.column, row)
        if value is None:
            return None
        if _kind(value) not in {_kind(item) for item in self.values}:
            raise ConditionError(
                f"{self.column.name}: got {value!r}, expected {_kind(self.values[0])} as in {list(self.values)}"
            )
        return any(_kind(item) == _kind(value) and item == value for item in self.values)

    def columns(self) -> Iterator[str]:
        yield self.column.name


@dataclass(frozen=True)
class IsNull:
    """`column is null`, which alone is true of nulls."""

    column: Column

    def verdict(self, row: Mapping[str, Any]) -> Verdict:
        return _value(self.column, row) is None

    def columns(self) -> Iterator[str]:
        yield self.column.name


@dataclass(frozen=True)
class Not:
    """`not part`; unknown stays unknown."""

    part: Expression

    def verdict(self, row: Mapping[str, Any]) -> Verdict:
        verdict = self.part.verdict(row)
        return None if verdict is None else not verdict

    def columns(self) -> Iterator[str]:
        return self.part.columns()


@dataclass(frozen=True)
class And:
    """True where all parts are, false where any is."""

    parts: tuple[Expression, ...]

    def verdict(self, row: Mapping[str, Any]) -> Verdict:
        return all_of([part.verdict(row) for part in self.parts])

    def columns(self) -> Iterator[str]:
        for part in self.parts:
            yield from part.columns()


@dataclass(frozen=True)
class Or:
    """True where any part is, false where all are."""

    parts: tuple[Expression, ...]

    def verdict(self, row: Mapping[str, Any]) -> Verdict:
        return any_of([part.verdict(row) for part in self.parts])

    def columns(self) -> Iterator[str]:
        for part in self.parts:
            yield from part.columns()


def all_of(verdicts: list[Verdict]) -> Verdict:
    """Kleene's and."""
    if False in verdicts:
        return False
    return None if None in verdicts else True


def any_of(verdicts: list[Verdict]) -> Verdict:
    """Kleene's or."""
    if True in verdicts:
        return True
    return None if None in verdicts else False


def is_null(value: Any) -> bool:
    """Say whether a value counts as missing: json's null, or the NaN that tables write for it. 0.0 does not."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _value(side: Column | Value, row: Mapping[str, Any]) -> Any:
    if not isinstance(side, Column):
        return side
    value = row[side.name]
    return None if is_null(value) else value


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "a text" if isinstance(value, str) else f"a {type(value).__name__}"


def parse(text: str) -> Expression:
    """Read a condition; raises ConditionError, which shows the place, for what the grammar does not know."""
    return _Parser(text).whole()


class _Parser:
    """Recursive descent over the tokens of one condition."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(_tokens(text))
        self.place = 0
        self.depth = 0

    def whole(self) -> Expression:
        expression = self._condition()
        if self.place < len(self.tokens):
            raise self._error("and, or, or the end")
        return expression

    def _condition(self) -> Expression:
        parts = [self._conjunction()]
        while self._skip("or"):
            parts.append(self._conjunction())
        return parts[0] if len(parts) == 1 else Or(tuple(parts))

    def _conjunction(self) -> Expression:
        parts = [self._factor()]
        while self._skip("and"):
            parts.append(self._factor())
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def _factor(self) -> Expression:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ConditionError(f"condition: got more than {MAX_DEPTH} levels of not and brackets, expected fewer")
        try:
            if self._skip("not"):
                return Not(self._factor())
            if not self._skip("("):
                return self._test()
            expression = self._condition()
            self._expect(")")
            return expression
        finally:
            self.depth -= 1

    def _test(self) -> Expression:
        left = self._operand()
        if isinstance(left, Column):
            if self._skip("is"):
                negated = self._skip("not")
                self._expect("null")
                return Not(IsNull(left)) if negated else IsNull(left)
            negated = self._skip("not")
            if self._skip("in"):
                membership = Membership(left, self._literals())
                return Not(membership) if negated else membership
            if negated:
                raise self._error("in")
        return self._comparisons(left)

    def _comparisons(self, left: Column | Value) -> Expression:
        """Read what follows a first operand, as in `x < 3` or the `<= x < 3` of `1 <= x < 3`."""
        chain: list[Expression] = []
        while not chain or (len(chain) < 2 and self._peek("sign") in RELATIONS):
            relation = self._peek("sign")
            if relation not in RELATIONS:
                raise self._error("one of " + " ".join([*RELATIONS, "in", "is"]))
            self.place += 1
            right = self._operand()
            if not (isinstance(left, Column) or isinstance(right, Column)):
                raise self._error(f"a column instead of {left!r} {relation} {right!r}")
            chain.append(Comparison(left, relation, right))
            left = right
        return chain[0] if len(chain) == 1 else And(tuple(chain))

    def _operand(self) -> Column | Value:
        kind, value = self._next()
        if kind == "quoted" or (kind == "name" and value not in WORDS):
            self.place += 1
            return Column(str(value))
        if value == "null":
            raise self._error("a value; nulls are found by `is null`")
        return self._literal()

    def _literals(self) -> tuple[Value, ...]:
        self._expect("[")
        values = [self._literal()]
        while self._skip(","):
            values.append(self._literal())
        self._expect("]")
        return tuple(values)

    def _literal(self) -> Value:
        kind, value = self._next()
        if kind in ("number", "text"):
            self.place += 1
            literal: Value = value
            return literal
        if kind == "name" and value in ("true", "false"):
            self.place += 1
            return value == "true"
        raise self._error('a number, a "text", true or false')

    def _next(self) -> tuple[str, Any]:
        return self.tokens[self.place] if self.place < len(self.tokens) else ("end", None)

    def _peek(self, kind: str) -> Any:
        found, value = self._next()
        return value if found == kind else None

    def _skip(self, word: str) -> bool:
        found = word in (self._peek("name"), self._peek("sign"))
        self.place += found
        return found

    def _expect(self, word: str) -> None:
        if not self._skip(word):
            raise self._error(word)

    def _error(self, expected: str) -> ConditionError:
        found = repr(self.tokens[self.place][1]) if self.place < len(self.tokens) else "the end"
        return ConditionError(f"condition: got {found} in {self.text!r}, expected {expected}")


def _tokens(text: str) -> Iterator[tuple[str, Any]]:
    place = 0
    while text[place:].strip():
        match = _TOKEN.match(text, place)
        if match is None:
            rest = text[place:].strip()
            hint = "; equal is ==" if rest[0] == "=" else ""
            raise ConditionError(
                f"condition: got {rest[:20]!r} in {text!r}, expected a column, a value or a sign{hint}"
            )
        place, kind = match.end(), str(match.lastgroup)
        yield kind, _literal_value(kind, match[kind])


def _literal_value(kind: str, text: str) -> Value:
    if kind == "number":
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    if kind == "text":
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    return text.lower() if kind == "name" and text.lower() in WORDS else text
