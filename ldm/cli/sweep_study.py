"""A sweep's study: Optuna's journal in the sweep's folder, which a killed sweep takes up where it stopped."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ldm.cli.sweep_space import Parameter, Value

# How a trial ended, as tables say it, and as Optuna has it. To the search a diverged trial is a bad one, as a pruned
# one is, and not one that tells nothing, as a failed one is: it draws no more like it.
STATES = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclass(frozen=True)
class Study:
    """The trials of a sweep.

    Args:
        study: Optuna's.
        parameters: what is searched.
        search: makes the sampler of one trial from a seed.
        seed: of all drawing.
    """

    study: optuna.Study
    parameters: Sequence[Parameter]
    search: Callable[[int], optuna.samplers.BaseSampler]
    seed: int

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials so far, in order."""
        return self.study.get_trials(deepcopy=False)

    @property
    def finished(self) -> list[FrozenTrial]:
        """Trials with a value."""
        return [trial for trial in self.trials if trial.state == TrialState.COMPLETE]

    def best(self) -> FrozenTrial | None:
        """The finished trial with the best value, or None where none finished."""
        return self.study.best_trial if self.finished else None

    def unfinished(self) -> list[optuna.trial.Trial]:
        """Trials that were under way when the sweep stopped."""
        running = [trial for trial in self.trials if trial.state == TrialState.RUNNING]
        return [optuna.trial.Trial(self.study, trial._trial_id) for trial in running]

    def ask(self) -> optuna.trial.Trial:
        """A new trial."""
        self._seed(len(self.trials))
        return self.study.ask()

    def values(self, trial: optuna.trial.Trial) -> dict[str, Value]:
        """What the trial tries, by key; drawn now where it has not been yet."""
        self._seed(trial.number)
        return {parameter.key: parameter.suggest(trial) for parameter in self.parameters}

    def tell(self, trial: optuna.trial.Trial, outcome: str, *, value: float | None = None, reason: str = "") -> None:
        """Ends a trial; what it reported last is the value of a pruned one."""
        trial.set_user_attr("outcome", outcome)
        if reason:
            trial.set_user_attr("reason", reason)
        self.study.tell(trial, value, state=STATES[outcome])

    def _seed(self, number: int) -> None:
        """Draws depend on the seed, the trial's number and the trials before: not on when a sweep was killed."""
        self.study.sampler = self.search(random.Random(f"{self.seed} {number}").getrandbits(32))


def open_study(
    folder: Path,
    parameters: Sequence[Parameter],
    *,
    direction: Literal["minimize", "maximize"],
    pruner: optuna.pruners.BasePruner,
    search: Callable[[int], optuna.samplers.BaseSampler],
    seed: int,
) -> Study:
    """The study in `folder/journal.log`, made or taken up; the folder belongs to this process alone."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    journal = folder / "journal.log"
    _repair(journal)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.create_study(
        storage=storage, study_name="sweep", direction=direction, pruner=pruner, load_if_exists=True
    )
    return Study(study, parameters, search, seed)


def report(trial: optuna.trial.Trial, values: dict[int, float], seen: set[int]) -> bool:
    """Reports values by step that the study has not seen; returns whether there were any."""
    new = sorted(step for step in values if step not in seen)
    for step in new:
        trial.report(values[step], step)
    seen.update(new)
    return bool(new)


def reported(trial: optuna.trial.Trial) -> set[int]:
    """The steps that the study has of a trial."""
    return set(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)


def importances(study: Study) -> dict[str, float]:
    """The share of each parameter in how values differ (fANOVA; Hutter et al. 2014); empty where too few finished."""
    if len({trial.value for trial in study.finished}) < 2 or len(study.parameters) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        return optuna.importance.get_param_importances(study.study, evaluator=evaluator)
    except (RuntimeError, ValueError):
        return {}


def fingerprint(*parts: Any) -> str:
    """Eight hexadecimal digits of what a sweep is."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def _repair(journal: Path) -> None:
    """Drops a last line that a kill cut off, and the lock of a process that is gone: this one alone writes here."""
    for lock in journal.parent.glob(f"{journal.name}.lock*"):
        lock.unlink()
    if not journal.is_file():
        return
    content = journal.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with journal.open("r+b") as file:
            file.truncate(whole)
