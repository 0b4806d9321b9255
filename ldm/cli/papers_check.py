"""Whether a card keeps its word: its experiment composes and binds, and everything counted is as printed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from hydra.utils import get_object

from ldm.cli.compose import compose_command
from ldm.cli.errors import UserError, user_mistakes
from ldm.cli.meta import PER_BILLION, PER_MILLION, Part, run_name
from ldm.cli.papers_build import Paper, agrees, as_printed

SAID = ("url", "hardware", "training")
SAID_OF_TRAINING = ("batch_size", "lr", "lr_rule", "steps")


def faults(paper: Paper) -> list[str]:
    """What is wrong with a paper, a sentence each."""
    found: list[str] = []
    for check in (said, composes, bound, requirements, counted, trained):
        try:
            with user_mistakes():
                found += check(paper)
        except UserError as error:
            found.append(str(error))
        if found and check in (said, composes):
            break
    return found


def said(paper: Paper) -> Iterator[str]:
    """What every card says, and no difference that names nothing."""
    card = paper.card
    yield from (f"card.{name} is missing" for name in SAID if not getattr(card, name))
    yield from (f"card.training.{name} is missing" for name in SAID_OF_TRAINING if name not in card.training)
    if not card.notes:
        empty = [name for name in ("parameters", "published") if not getattr(card, name)]
        yield from (f"card.{name} is empty and card.notes does not say why" for name in empty)
    known = [*(f"parameters.{name}" for name in card.parameters), *(f"multiply_adds.{n}" for n in card.multiply_adds)]
    known += [f"training.{name}" for name in card.training]
    yield from (f"card.differences.{name} is of nothing published" for name in card.differences if name not in known)


def composes(paper: Paper) -> Iterator[str]:
    """The experiment composes and has the name that its runs are found by."""
    if paper.config.get("name") != run_name(paper.experiment):
        yield f"name is {paper.config.get('name')}, expected {run_name(paper.experiment)}"


def bound(paper: Paper) -> Iterator[str]:
    """Every `_target_` takes its settings."""
    for place, node in targets(paper.config):
        target = get_object(node["_target_"])
        settings = {key: value for key, value in node.items() if not key.startswith("_")}
        if getattr(target, "__module__", "") == "datetime":
            continue
        signature = inspect.signature(target)
        try:
            (signature.bind_partial if node.get("_partial_") else signature.bind)(**settings)
        except TypeError as error:
            yield f"{place}: {node['_target_']} {error}"


def targets(node: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every nested node with a `_target_`, by its place."""
    if isinstance(node, dict) and "_target_" in node:
        yield place, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from targets(value, f"{place}.{key}" if place else str(key))


def requirements(paper: Paper) -> Iterator[str]:
    """What it requires composes, and ends."""
    for line in paper.config.get("requires") or []:
        words = line.split()
        if not any(word.partition("=")[2] in paper.library.names for word in words):
            compose_command(words[0], words[1:])
    seen: list[str] = []
    waiting = list(paper.requires)
    while waiting:
        name = waiting.pop()
        if name == paper.experiment:
            yield f"requires itself by way of {', '.join(seen)}"
            return
        if name not in seen:
            seen.append(name)
            waiting += paper.library.paper(name).requires


def counted(paper: Paper) -> Iterator[str]:
    """Parameters and multiply-adds are the published ones to their printed digits, or the card says why not."""
    parts = paper.parts(flops=bool(paper.card.multiply_adds))
    for name, built, printed in counts(paper, parts):
        yield from compared(paper, name, built, printed)


def counts(paper: Paper, parts: dict[str, Part]) -> Iterator[tuple[str, float, float | str]]:
    """(name, built, printed) of everything that the card prints of its parts; raises UserError for a part not built."""
    printed = [(f"parameters.{name}", name, value) for name, value in paper.card.parameters.items()]
    printed += [(f"multiply_adds.{name}", name, value) for name, value in paper.card.multiply_adds.items()]
    for key, part, value in printed:
        if part == "total":
            yield key, paper.total(parts) / PER_MILLION, value
        elif part not in parts:
            raise UserError(f"card.{key}: got a count of a part that the experiment does not build")
        elif key.startswith("parameters"):
            yield key, parts[part].parameters / PER_MILLION, value
        else:
            yield key, (parts[part].multiply_adds or 0) / PER_BILLION, value


def trained(paper: Paper) -> Iterator[str]:
    """Batch size, learning rate and steps are those of the experiment, and the rate follows its rule."""
    training, card = paper.training, paper.card.training
    for name, built in training.items():
        yield from compared(paper, f"training.{name}", built, card[name], agree=same_number)
    if "base_lr" in card and not same_number(card["base_lr"] * card["batch_size"], card["lr"], within=0.03):
        product = card["base_lr"] * card["batch_size"]
        if "training.lr" not in paper.card.differences:
            yield f"training: base_lr times batch_size is {product:g}, and lr {card['lr']:g}"


def compared(
    paper: Paper,
    name: str,
    built: float,
    printed: Any,
    *,
    agree: Callable[[float, Any], bool] = agrees,
) -> Iterator[str]:
    """That built is as printed; else that the card explains it, and is right in what it says is built."""
    difference = paper.card.differences.get(name)
    if difference is None:
        if not agree(built, printed):
            shown = as_printed(built, printed) if agree is agrees else f"{built:g}"
            yield f"{name}: published {printed}, built {shown} ({built:.6g}); add card.differences.{name} or mend it"
        return
    if agree(built, printed):
        yield f"card.differences.{name}: nothing differs, {printed} is built; take it out"
    elif not agree(built, difference["built"]):
        yield f"card.differences.{name}: says {difference['built']} is built, which is {built:.6g}"


def same_number(one: float, other: Any, *, within: float = 1e-6) -> bool:
    """Whether two numbers are the same but for rounding."""
    return abs(one - float(other)) <= within * max(abs(one), abs(float(other)))
