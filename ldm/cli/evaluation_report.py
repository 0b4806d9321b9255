"""Evaluations as a page with curves and a paper's figures: what `ldm evaluate` and `ldm compare` share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from ldm.cli.cards import card_node, read_card
from ldm.cli.chain import shown
from ldm.cli.console import heading, rank, say, show
from ldm.cli.ema import averaged
from ldm.cli.errors import UserError, user_mistakes
from ldm.cli.run_folder import run_folder_of, write_json

if TYPE_CHECKING:
    from ldm.generation import Pipeline
    from ldm.generation.evaluation.told import Tell
    from ldm.generation.report import Amounts, Comparison, EvaluationFolder

PAGE, FIGURES, EVALUATIONS = "report.html", "evaluation.json", "evaluations"
# More evaluations than these have a row each instead of a column.
MAX_COLUMNS = 3


def averaged_checkpoint(checkpoint: Path, sigma_rel: float | None) -> Path:
    """The checkpoint itself, or an average of this length of the run that it belongs to.

    Raises:
        UserError: it belongs to none, or the run kept no snapshots.
    """
    if sigma_rel is None:
        return checkpoint
    folder = run_folder_of(checkpoint.absolute())
    if folder is None:
        raise UserError(
            f"ema: got {checkpoint}, which belongs to no run, expected one that kept snapshots; leave it out"
        )
    return averaged(folder, sigma_rel)


def draw_strips(
    pipeline: Pipeline, out: Path, config: DictConfig, settings: Mapping[str, Any], tell: Tell | None
) -> None:
    """Writes what the model believed on the way to some of the evaluation's samples, for the page.

    All processes of the evaluation share the strips out.

    Args:
        tell: what the network is told besides prompts; None = nothing.
    """
    from ldm.generation import Order
    from ldm.generation.evaluation.workers import FreeWorkers
    from ldm.generation.report import EvaluationFolder, strip_tasks
    from ldm.generation.report.vote_page import spread

    if config.report is None or not (out / FIGURES).is_file():
        return
    evaluation = EvaluationFolder(out)
    indices = spread(range(len(evaluation)), read_amounts(config.report).strips)
    samples = [evaluation.sample(index) for index in indices]
    orders = [Order(sample.prompt, sample.seed or 0, str(config.negative_prompt)) for sample in samples]
    chosen = replace(pipeline.settings, **settings)
    how = None if tell is None else lambda order: tell([order.seed])
    FreeWorkers().do(strip_tasks(pipeline, orders, out, indices=indices, settings=chosen, how=how), out)


def wants_page(out: Path, config: DictConfig) -> bool:
    """Whether this process writes a page: an experiment's own kind of evaluation may leave nothing to show."""
    return config.report is not None and rank() == 0 and (out / FIGURES).is_file()


def report_evaluation(out: Path, config: DictConfig) -> None:
    """Writes the page of a finished evaluation, unless `report=null`."""
    if not wants_page(out, config):
        return
    comparisons = write_report(open_folders(str(out)), out, amounts=config.report, card=config.card)
    for comparison in comparisons:
        tell_card(comparison)


def report_sweep(folders: Sequence[Path]) -> None:
    """Writes one page of all evaluations of a sweep, with curves, beside them, and as many pictures as theirs have.

    With `report=null` they have no pages: nothing was laid beside them to look for neighbours in.
    """
    names = list(dict.fromkeys(str(folder) for folder in folders if (folder / FIGURES).is_file()))
    if len(names) < 2 or rank():
        return
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    evaluations = open_folders(names)
    out = Path(names[0]).parent / f"sweep-{digest}"
    own = Path(names[0]) / "config.yaml"
    amounts = OmegaConf.load(own).report if own.is_file() else None
    tell(evaluations, write_report(evaluations, out, amounts=amounts or OmegaConf.create({"neighbours": 0})))


def open_folders(value: Any) -> list[EvaluationFolder]:
    """The evaluations that a setting names: a folder, a list of them, or a dict of them by name.

    Raises:
        UserError: there is none, or one is named twice.
    """
    from ldm.generation.report import EvaluationFolder, axes_told

    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    named: dict[str, str | None] = {}
    if isinstance(plain, Mapping):
        named = {str(path): str(name) for name, path in plain.items()}
    elif plain:
        named = dict.fromkeys(map(str, plain if isinstance(plain, list) else [plain]))
    if not named:
        raise UserError("evaluations: got none, expected folders that `ldm evaluate` wrote: evaluations=[A,B]")
    with user_mistakes():
        found = [EvaluationFolder(evaluation_folder(Path(path)), name=name) for path, name in named.items()]
    if not isinstance(plain, Mapping) and len({_origin(one) for one in found}) == 1:
        for one, name in zip(found, axes_told(found), strict=True):
            one.name = name
    return found


def _origin(evaluation: EvaluationFolder) -> str:
    """Whose samples these are: a run's, or else a file's, or what was measured."""
    run = run_folder_of(evaluation.path.absolute().parent)
    said = [evaluation.protocol.get(name) or {} for name in ("checkpoint", "images")]
    return str(run or [part.get("sha256") for part in said])


def evaluation_folder(path: Path) -> Path:
    """The folder itself, or the newest finished evaluation of a run folder.

    Raises:
        UserError: there is neither.
    """
    path = path.expanduser()
    found = sorted((path / EVALUATIONS).glob(f"*/{FIGURES}"), key=lambda file: file.stat().st_mtime)
    if found:
        return found[-1].parent
    if not (path / FIGURES).is_file():
        raise UserError(
            f"evaluations: got {path}, which holds no {FIGURES}; expected a folder that `ldm evaluate` finished, or a "
            "run folder with one"
        )
    return path


def write_report(
    evaluations: Sequence[EvaluationFolder], out: Path, *, amounts: DictConfig | None = None, card: str | None = None
) -> list[Comparison]:
    """Writes report.html, curves and comparison.json into `out` and says where; returns the papers' side of it.

    Args:
        amounts: how many pictures the page shows.
        card: of an experiment; None takes that of each evaluation's own run, where it has one.

    Raises:
        UserError: a setting is wrong.
    """
    from ldm.files import write_text
    from ldm.generation.report import curves, report_page, write_curves

    comparisons = compared(evaluations, card)
    found = curves(evaluations)
    with user_mistakes():
        page = report_page(evaluations, curves=found, comparisons=comparisons, amounts=read_amounts(amounts))
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / PAGE, page)
    if found:
        write_curves(found, out / "curves")
    if len(evaluations) > 1 or comparisons:
        write_json(out / "comparison.json", as_json(evaluations, comparisons))
    heading(f"{len(evaluations)} evaluation{'s' if len(evaluations) > 1 else ''} in {shown(out.absolute())}")
    say(f"  page        {shown((out / PAGE).absolute())}")
    if found:
        say(f"  curves      {shown((out / 'curves').absolute())} ({len(found)} as SVG and PNG)")
    return comparisons


def read_amounts(node: DictConfig | None) -> Amounts:
    """How many pictures a page shows; raises UserError for a number that is none."""
    from ldm.generation.report import Amounts

    with user_mistakes():
        return Amounts(**cast(dict[str, Any], OmegaConf.to_container(node) if node is not None else {}))


def compared(evaluations: Sequence[EvaluationFolder], card: str | None) -> list[Comparison]:
    """Each evaluation beside the card that is named, or beside its own run's."""
    from ldm.generation.report import Card, compare

    if card is not None:
        chosen = read_card(card)
        return [compare(chosen, one) for one in evaluations]
    found = []
    for one in evaluations:
        run = run_folder_of(one.path.absolute().parent)
        node = card_node(run / "config.yaml") if run else None
        if node is not None:
            with user_mistakes():
                found.append(compare(Card.read(node, source=f"{run}/config.yaml"), one))
    return found


def as_json(evaluations: Sequence[EvaluationFolder], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """What a program reads of a comparison."""
    return {
        "evaluations": [
            {"name": one.name, "path": str(one.path.absolute()), "figures": one.figures, "protocol": one.protocol}
            for one in evaluations
        ],
        "papers": [comparison.as_json() for comparison in comparisons],
    }


def tell(evaluations: Sequence[EvaluationFolder], comparisons: Sequence[Comparison]) -> None:
    """Prints the figures side by side, and what papers say beside them."""
    names = list(dict.fromkeys(name for one in evaluations for name in one.figures))
    rows = [[name, *(_number(one.figures.get(name)) for one in evaluations)] for name in names]
    heads = ["", *(one.name for one in evaluations)]
    if len(evaluations) > MAX_COLUMNS:
        kept = [[name, *cells] for name, *cells in rows if not name.startswith("seconds_")]
        heads, *rows = [list(line) for line in zip(heads, *kept, strict=True)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    show(table)
    for comparison in comparisons:
        tell_card(comparison)


def tell_card(comparison: Comparison) -> None:
    """Prints published against measured, and each difference of the protocols by name."""
    title = f"{comparison.card.name}, beside {comparison.name}"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for name in ("", "published", "measured", "difference"):
        table.add_column(name, justify="right" if name else "left")
    for one in comparison.figures:
        table.add_row(one.name, _number(one.published), _number(one.measured), _number(one.difference))
    show(table)
    for other in comparison.differences:
        say(f"  protocol  {other.name}: published {other.published}, measured {other.measured}", style="yellow")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
