"""`ldm reproduce`: trains a published experiment, evaluates it by its card's protocol, and judges."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from ldm.cli.cards import printed_figure
from ldm.cli.chain import run_chain, shown
from ldm.cli.compose import compose_command, is_number
from ldm.cli.console import CHECK_FAILED, heading, rank, say, show
from ldm.cli.ema import averaged
from ldm.cli.errors import RunFailed, UserError, user_mistakes
from ldm.cli.job import quote
from ldm.cli.papers_build import decimals
from ldm.cli.reproduce_evaluation import evaluation_overrides, measured_metrics, miniature
from ldm.cli.run_folder import RunFolder, write_json
from ldm.cli.unread import refuse_unread

if TYPE_CHECKING:
    from ldm.generation.report import Card

RESULT = "reproduction.json"
OWN = "reproduce"


@dataclass(frozen=True)
class Verdict:
    """One published figure beside the measured one.

    Args:
        published: the figure.
        values: as measured, an evaluation each.
        mean: of the values.
        half_width: of the confidence interval around it; 0 where there is one value.
        tolerance: by how much the figure may be worse.
        verdict: PASS, FAIL, or BETTER: beyond the interval on the good side.
    """

    row: str
    figure: str
    published: float
    values: tuple[float, ...]
    mean: float
    half_width: float
    tolerance: float
    verdict: str


def reproduce(config: DictConfig, overrides: Sequence[str]) -> None:
    """Trains, evaluates and judges.

    Raises:
        UserError: the experiment has no card, or a setting is wrong or changes nothing.
        RunFailed: training failed, or a figure is worse than published, or none was measured.
    """
    card = card_of(config)
    settings = config[OWN]
    check_settings(settings, is_autoencoder=config.get("network") is None)
    # A mistake in it shows now, and not behind weeks of training.
    rows = chosen_rows(card, settings.rows)
    base = [item for item in overrides if item.lstrip("+~").partition("=")[0].partition(".")[0] != OWN]
    trained = compose_command("train", base)
    refuse_unread(trained, base)
    folder = run_chain("train", trained, base)
    if rank():
        return
    verdicts, told = [], []
    for name, row in rows:
        evaluations = evaluate_row(folder, row, settings)
        verdicts += judged(name, row, evaluations, settings)
        told += differences(name, row, evaluations)
    finish(folder, card, verdicts, told)


def card_of(config: DictConfig) -> Card:
    """The card of a composed experiment.

    Raises:
        UserError: it has none.
    """
    from ldm.generation.report import Card

    node = config.get("card")
    if node is None:
        raise UserError(
            f"reproduce: got {config.get('name')}, which has no paper card; `ldm papers` lists those that do"
        )
    with user_mistakes():
        return Card.read(OmegaConf.to_container(node, resolve=True), source=str(config.name))


def check_settings(settings: DictConfig, *, is_autoencoder: bool) -> None:
    """Refuses settings out of range, or without effect.

    Raises:
        UserError: got, expected, remedy.
    """
    if not isinstance(settings.seeds, int) or settings.seeds < 1:
        raise UserError(f"reproduce.seeds: got {settings.seeds}, expected at least 1; 3 make an interval")
    if not 0 < settings.confidence < 1:
        raise UserError(f"reproduce.confidence: got {settings.confidence}, expected between 0 and 1, such as 0.95")
    tolerance, count = settings.tolerance, settings.num_samples
    if tolerance is not None and not (is_number(tolerance) and tolerance >= 0):
        raise UserError(f"reproduce.tolerance: got {tolerance}, expected a share from 0 on")
    if count is not None and not (is_number(count) and isinstance(count, int) and count > 0):
        raise UserError(f"reproduce.num_samples: got {count}, expected a positive integer")
    if count is not None and is_autoencoder:
        raise UserError(
            f"reproduce.num_samples: got {count} for an autoencoder, which reconstructs all of data.validation; leave "
            "it out"
        )


def chosen_rows(card: Card, asked: Any) -> list[tuple[str, Card]]:
    """(name, row) of what is judged: the card's own row, and those that are asked for.

    Raises:
        UserError: there is no such row.
    """
    names = list(card.rows) if asked == "all" else [asked] if isinstance(asked, str) else list(asked or [])
    with user_mistakes():
        rows = [("", card), *((name, card.row(name)) for name in names)]
    found = []
    for name, row in rows:
        if row.steps is not None:
            say(f"row {name}: of step {row.steps:,}, which this run does not keep; set trainer.max_steps={row.steps}")
        elif not row.published:
            say(f"{name or 'card'}: nothing was published to compare with", style="yellow")
        else:
            found.append((name, row))
    return found


def evaluate_row(folder: RunFolder, row: Card, settings: DictConfig) -> list[Path]:
    """Evaluations by a row's protocol, one a seed; those that are there are not done again."""
    from ldm.cli.evaluate import evaluate

    count = 1 if folder.config.get("network") is None else settings.seeds
    if not measured_metrics(row, folder.config):
        say(f"{row.name}: none of its figures can be measured here ({', '.join(row.published)})", style="yellow")
        return []
    found = []
    others = other_models(folder, row)
    for number in range(count):
        words = [*evaluation_overrides(folder, row, number, settings), *others]
        heading(f"evaluation {number + 1}/{count}: {row.name}")
        composed = compose_command("evaluate", words)
        if folder.config.get("scale"):
            miniature(composed)
        found.append(evaluate(composed, words))
    return found


def other_models(folder: RunFolder, row: Card) -> list[str]:
    """Overrides that name the other models a row is sampled with, such as a guide; trained first, as the chain is."""
    found = []
    length = OmegaConf.select(OmegaConf.create(dict(row.protocol)), "ema.sigma_rel")
    for key, experiment in (row.evaluate.get("models") or {}).items():
        if key == "guidance.guide" and folder.config.get("scale"):
            say(f"{row.name}: without its guide: first stages are random in miniature, each another", style="yellow")
            continue
        words = [f"experiment={experiment}", *folder.config.inherit, f"paths.runs={folder.config.paths.runs}"]
        heading(f"{row.name}: {key}")
        place = run_chain("train", compose_command("train", words), words).path
        # A guide is averaged over the same length.
        is_averaged = key == "guidance.guide" and length is not None
        found.append(quote(f"{key}={averaged(place, length) if is_averaged else place}"))
    return found


def judged(name: str, row: Card, evaluations: Sequence[Path], settings: DictConfig) -> list[Verdict]:
    """A verdict a published figure that was measured."""
    from ldm.generation.report import EvaluationFolder

    opened = [EvaluationFolder(path) for path in evaluations]
    found = []
    for figure, published in row.published.items():
        values = [value for one in opened if (value := one.figure(figure)) is not None]
        if values:
            higher = is_higher_better(figure, opened[0].metrics)
            printed = printed_figure(HydraConfig.get().runtime.choices["experiment"], name, figure, float(published))
            verdict = judge(
                printed, values, higher=higher, confidence=settings.confidence, tolerance=settings.tolerance
            )
            found.append(Verdict(name or "card", figure, float(published), **verdict))
        elif opened:
            say(f"{row.name}: {figure} was not measured", style="yellow")
    return found


def judge(
    printed: float | str, values: Sequence[float], *, higher: bool, confidence: float, tolerance: float | None
) -> dict[str, Any]:
    """The interval of a figure, and whether it reaches what was published.

    The interval is Student's around the mean of the evaluations. A figure passes that is no worse than published by
    more than the tolerance, at the good end of its interval; half of the last printed digit is always allowed.

    Args:
        printed: the published figure; text keeps the zeros behind it.
    """
    published, mean, half = float(printed), statistics.fmean(values), half_width(values, confidence)
    allowed = max(0.5 * 10 ** -decimals(printed), (tolerance or 0) * abs(published))
    sign = 1 if higher else -1
    shortfall = sign * (published - mean)
    verdict = "FAIL" if not shortfall - half <= allowed else "BETTER" if shortfall + half < -allowed else "PASS"
    return {"values": tuple(values), "mean": mean, "half_width": half, "tolerance": allowed, "verdict": verdict}


def half_width(values: Sequence[float], confidence: float) -> float:
    """Half of Student's confidence interval of the mean; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    from scipy.stats import t

    return float(t.ppf(0.5 + confidence / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def is_higher_better(figure: str, metrics: Mapping[str, Any]) -> bool:
    """Whether more of a figure is better, as the metric says that has it."""
    for name, metric in metrics.items():
        if figure in (name, *(metric.get("values") or {})):
            return bool(metric.get("higher_is_better"))
    return False


def differences(name: str, row: Card, evaluations: Sequence[Path]) -> list[str]:
    """In what the first evaluation's protocol is not the published one."""
    from ldm.generation.report import EvaluationFolder, compare

    found = [compare(row, EvaluationFolder(path)) for path in evaluations[:1]]
    return [
        f"{name or 'card'}: {one.name} published {one.published}, here {one.measured}"
        for comparison in found
        for one in comparison.differences
    ]


def finish(folder: RunFolder, card: Card, verdicts: Sequence[Verdict], told: Sequence[str]) -> None:
    """Prints and writes down the verdicts.

    Raises:
        RunFailed: a figure is worse than published, or none was measured, and the run is not a miniature.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, head in enumerate(("figure", "row", "published", "measured", "interval", "verdict")):
        table.add_column(head, justify="right" if 1 < place < 5 else "left")
    for one in verdicts:
        low, high = one.mean - one.half_width, one.mean + one.half_width
        interval = f"{low:.4g} to {high:.4g}" if len(one.values) > 1 else "–"
        table.add_row(one.figure, one.row, f"{one.published:g}", f"{one.mean:.4g}", interval, one.verdict)
    heading(f"{card.name}: {card.citation}, {card.table}")
    show(table)
    for line in told:
        say(f"  protocol  {line}", style="yellow")
    for line in card.contradictions:
        say(f"  contradiction  {line}", style="yellow")
    write_json(folder.path / RESULT, {"verdicts": [asdict(one) for one in verdicts], "protocol_differences": told})
    say(f"  {shown(folder.path / RESULT)}")
    failed = [one.figure for one in verdicts if one.verdict == "FAIL"]
    if folder.config.get("scale"):
        say("this was a miniature, whose verdicts mean nothing", style="yellow")
    elif not verdicts:
        raise RunFailed("no published figure was measured, so that nothing was judged", CHECK_FAILED)
    elif failed:
        raise RunFailed(
            f"{len(failed)} of {len(verdicts)} figures are worse than published: {', '.join(failed)}", CHECK_FAILED
        )
