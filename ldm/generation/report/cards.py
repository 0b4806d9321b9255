"""Paper cards: what a paper published, by which protocol, and how a measured run differs from both."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ldm.generation.report.reading import EvaluationFolder, flattened

NOT_RECORDED = "not recorded"
# Numbers that differ by less are the same setting.
TOLERANCE = 1e-9
# A seed draws other samples of one protocol, and these say where things lie rather than what was done.
UNTOLD = ("seed", "seeds", "versions", "checkpoint", "images", "weights_sha256")
REQUIRED = ("citation", "table", "protocol")
# Parts of a model that are counted by themselves.
PARTS = ("network", "encoder", "first_stage")


@dataclass(frozen=True)
class Card:
    """A row of a paper's table, as the node `card` of an experiment.

    Args:
        citation: authors, title, year.
        table: the table and the row, or the file that says it.
        published: figures by the names that `ldm evaluate` gives them: fid, inception_score, precision, recall, ...
        protocol: how they were measured, by the names of `ldm evaluate`'s protocol: num_samples, sampler, steps,
            guidance: {scale: 1}, reference: {count: 30000}, ...; what is said nowhere is left out.
        title: what the row is called.
        url: where it can be read.
        hardware: what it was trained on.
        hours: of that hardware.
        first_stage: option of conf/autoencoder with the geometry of an autoencoder that is only loaded.
        parameters: millions as printed, by part (network, encoder, first_stage), and the paper's own `total`.
        total_of: the parts that `total` adds.
        multiply_adds: 10^9 of one forward pass for one sample, as printed, by part.
        differences: what was published and is not met by what is built: by name {"built": value, "because": words}.
        training: batch_size, lr, base_lr, lr_rule, steps.
        evaluate: what an evaluation needs besides the protocol: reference, prompts, conditions, metrics,
            overrides; models: by setting the experiment that trains another model for it, such as
            {guidance.guide: paper/edm2_img512_xs_uncond}.
        rows: further published rows of the same training, each a difference from this one.
        steps: after which the row was measured; None = at the end.
        contradictions: between sources, one sentence each.
        notes: what a comparison needs to know besides.
    """

    citation: str
    table: str
    published: Mapping[str, float]
    protocol: Mapping[str, Any]
    title: str = ""
    url: str = ""
    hardware: str = ""
    hours: float | None = None
    first_stage: str | None = None
    parameters: Mapping[str, float | str] = field(default_factory=dict)
    total_of: tuple[str, ...] = ("network",)
    multiply_adds: Mapping[str, float | str] = field(default_factory=dict)
    differences: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    steps: int | None = None
    contradictions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, node: object, *, source: str) -> Card:
        """The card of a `card` node.

        Raises:
            ValueError: a part is missing, unknown or of the wrong kind.
        """
        if not isinstance(node, Mapping):
            raise ValueError(f"{source}: got no card, expected a node `card` with citation, table, published, protocol")
        names = [one.name for one in fields(cls)]
        for name in node:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
                raise ValueError(f"{source}: got card.{name}, which a card has not; {hint}")
        missing = [name for name in REQUIRED if not node.get(name)]
        if missing:
            raise ValueError(f"{source}: got a card without {', '.join(missing)}, expected these; add them")
        if node.get("published") is None:
            raise ValueError(f"{source}: got a card without published, expected figures, or {{}} where there are none")
        given = {str(name): _without_nulls(value) for name, value in node.items() if value is not None}
        for name, value in given["published"].items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{source}: got card.published.{name}={value!r}, expected a number")
        lists = {name: tuple(node.get(name) or ()) for name in ("contradictions", "notes")}
        card = cls(**{**given, **lists, "total_of": tuple(node.get("total_of") or ("network",))})
        card._check(source)
        return card

    def _check(self, source: str) -> None:
        """Raises ValueError for names that mean nothing."""
        unknown = [name for name in (*self.total_of, *self.multiply_adds) if name not in PARTS]
        unknown += [name for name in self.parameters if name not in (*PARTS, "total")]
        if unknown:
            raise ValueError(f"{source}: got the part {unknown[0]}, expected {', '.join(PARTS)}, or total")
        for name, difference in self.differences.items():
            if set(difference) != {"built", "because"}:
                raise ValueError(
                    f"{source}: got card.differences.{name} with {sorted(difference)}, expected built, because"
                )
        for name in self.rows:
            self.row(name)

    def row(self, name: str) -> Card:
        """The card of a further row: this one with what the row says instead; protocols are merged.

        Raises:
            ValueError: there is no such row, or it says what a row cannot.
        """
        if name not in self.rows:
            raise ValueError(f"got the row {name}, expected {', '.join(self.rows) or 'none: this card has one row'}")
        own = dict(self.rows[name])
        if strange := sorted(set(own) - ROW):
            raise ValueError(f"got card.rows.{name}.{strange[0]}, expected one of {', '.join(sorted(ROW))}")
        protocol = _without_nulls(_merged(self.protocol, own.pop("protocol", {})))
        evaluate = {**self.evaluate, **own.pop("evaluate", {})}
        own["title"] = own.get("title") or f"{self.name}, {name.replace('_', ' ')}"
        return replace(self, **own, protocol=protocol, evaluate=evaluate, rows={})

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.title or self.table


ROW = {"title", "table", "published", "protocol", "evaluate", "steps"}


def _without_nulls(value: Any) -> Any:
    """A mapping without what is null in it, which a card inherits and takes back."""
    if not isinstance(value, Mapping):
        return value
    return {str(name): _without_nulls(part) for name, part in value.items() if part is not None}


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for name, value in changes.items():
        before = found.get(name)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        found[name] = _merged(before, value) if both else value  # type: ignore[arg-type]
    return found


@dataclass(frozen=True)
class Figure:
    """One published figure beside the measured one, None where it was not measured."""

    name: str
    published: float
    measured: float | None

    @property
    def difference(self) -> float | None:
        """Measured less published."""
        return None if self.measured is None else self.measured - self.published

    @property
    def relative(self) -> float | None:
        """The difference as a share of what was published."""
        return None if self.difference is None or not self.published else self.difference / abs(self.published)


@dataclass(frozen=True)
class Difference:
    """A setting of the protocol that is not the same, or that one side does not tell."""

    name: str
    published: Any
    measured: Any


@dataclass(frozen=True)
class Comparison:
    """A card beside an evaluation, which goes by `name`."""

    card: Card
    name: str
    figures: list[Figure]
    differences: list[Difference]
    agreeing: list[str]

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "evaluation": self.name,
            "card": {"title": self.card.name, "citation": self.card.citation, "table": self.card.table},
            "figures": {
                one.name: {"published": one.published, "measured": one.measured, "difference": one.difference}
                for one in self.figures
            },
            "protocol_differences": {
                one.name: {"published": one.published, "measured": one.measured} for one in self.differences
            },
            "protocol_same": self.agreeing,
        }


# Figures that mean Inception's features where nothing else is said, and what its protocol calls it.
OF_INCEPTION = ("fid", "sfid", "kid", "inception_score")
INCEPTION = "Inception-v3 2015-12-05"


def implied(card: Card, said: Mapping[str, Any]) -> dict[str, str]:
    """The feature network of published figures that their names alone tell, where the run `said` which it took."""
    names = {f"{name}.features.network" for name in OF_INCEPTION if name in card.published}
    return dict.fromkeys(sorted(names & said.keys()), INCEPTION)


def compare(card: Card, evaluation: EvaluationFolder) -> Comparison:
    """What was published beside what was measured, and each setting that the card tells and the run does otherwise.

    A published figure of these names is of Inception's features, whether its card says so or not.
    """
    figures = [Figure(name, float(value), evaluation.figure(name)) for name, value in card.published.items()]
    said = whole_protocol(evaluation)
    differences, agreeing = [], []
    for name, published in {**implied(card, said), **flattened(card.protocol)}.items():
        measured = said.get(name, said.get(f"{name}.name", NOT_RECORDED))
        if same(published, measured):
            agreeing.append(name)
        else:
            differences.append(Difference(name, published, measured))
    return Comparison(card, evaluation.name, figures, differences, agreeing)


def whole_protocol(evaluation: EvaluationFolder) -> dict[str, Any]:
    """All settings of an evaluation with dotted names: its own, and those of each metric behind the metric's name."""
    own = {name: value for name, value in evaluation.protocol.items() if name not in UNTOLD}
    metrics = {name: metric.get("protocol") or {} for name, metric in evaluation.metrics.items()}
    return {**flattened(own), **flattened(metrics)}


def same(one: Any, other: Any) -> bool:
    """Whether two settings mean the same: numbers by value, words in any case and with any signs between them."""
    if isinstance(one, bool) or isinstance(other, bool) or one is None or other is None:
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other) <= TOLERANCE * max(abs(one), abs(other))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return _letters(one) == _letters(other)


def _letters(value: Any) -> str:
    return "".join(sign for sign in str(value).lower() if sign.isalnum() or sign == ".")
