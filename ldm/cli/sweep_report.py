"""What a sweep leaves: a table, trials.csv, report.html and the best trial as an experiment."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ldm.cli.chain import shown
from ldm.cli.console import say, show
from ldm.cli.sweep_best import best_command, write_best
from ldm.cli.sweep_plots import sweep_page
from ldm.cli.sweep_study import Study, importances

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from ldm.cli.sweep_run import Plan

# Rows of the table; trials.csv has them all.
_MOST_ROWS = 30


def conclude(folder: Path, study: Study, plan: Plan) -> FrozenTrial | None:
    """Writes what the trials so far found and prints it; returns the best trial, or None where none finished."""
    shares = importances(study)
    write_trials(folder / "trials.csv", study)
    (folder / "report.html").write_text(sweep_page(study, objective=plan.objective, shares=shares))
    show(trial_table(study, plan.objective))
    say(f"  sweep folder  {shown(folder)}")
    say(f"  report.html   {shown(folder / 'report.html')}")
    for key, share in shares.items():
        say(f"  importance    {share:4.0%}  {key}")
    best = study.best()
    if best is not None:
        title = f"trial {best.number} of {len(study.trials)}: {plan.objective} = {best.value:.6g}"
        path = write_best(folder, plan.trial_overrides(best.params), title=title)
        say(f"  best          {title} ({shown(path)})")
    return best


def next_command(folder: Path, study: Study, plan: Plan, hydra_options: Sequence[str]) -> str:
    """The command that trains the best trial's experiment."""
    best = study.best()
    assert best is not None
    return best_command(folder, hydra_options, plan.trial_overrides(best.params))


def write_trials(path: Path, study: Study) -> None:
    """One row a trial: number, outcome, value, what it tried, seconds, run folder, reason."""
    keys = [parameter.key for parameter in study.parameters]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "outcome", "value", *keys, "steps", "seconds", "run", "reason"])
        for trial in study.trials:
            attributes = trial.user_attrs
            steps = max(trial.intermediate_values, default="")
            writer.writerow(
                [trial.number, outcome(trial), "" if trial.value is None else trial.value]
                + [trial.params.get(key, "") for key in keys]
                + [steps, *(attributes.get(name, "") for name in ("seconds", "run", "reason"))]
            )


def trial_table(study: Study, objective: str) -> Table:
    """The trials, the best first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    keys = [parameter.key for parameter in study.parameters]
    for name in ("trial", "outcome", objective, *keys, "run"):
        table.add_column(name, justify="right" if name in ("trial", objective) else "left", no_wrap=True)
    ranked = sorted(study.trials, key=lambda trial: _rank(trial, study))
    for trial in ranked[:_MOST_ROWS]:
        cells = [str(trial.number), outcome(trial), text(trial.value)]
        table.add_row(
            *cells, *(text(trial.params.get(key, "")) for key in keys), Path(trial.user_attrs.get("run", "")).name
        )
    if len(ranked) > _MOST_ROWS:
        table.caption = f"and {len(ranked) - _MOST_ROWS} more in trials.csv"
    return table


def outcome(trial: FrozenTrial) -> str:
    """How a trial ended, in a word."""
    return str(trial.user_attrs.get("outcome", "unfinished"))


def text(value: Any) -> str:
    """A cell's text."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rank(trial: FrozenTrial, study: Study) -> tuple[bool, float, int]:
    """The best finished trials first, then the others by number."""
    is_finished = outcome(trial) == "finished"
    value = trial.value if is_finished and trial.value is not None else 0.0
    sign = 1 if study.study.direction.name == "MINIMIZE" else -1
    return not is_finished, sign * value, trial.number
