"""`ldm sweep`: many trials of one experiment, each a `ldm train` of its own, drawn and judged by Optuna."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from ldm.cli.build import build
from ldm.cli.chain import plan as plan_chain
from ldm.cli.chain import register_resolver, remember, shown
from ldm.cli.compose import compose_command, hydra_options
from ldm.cli.console import heading, rank, say
from ldm.cli.errors import Interrupted, RunFailed, UserError, did_you_mean, user_mistakes
from ldm.cli.provenance import redact, redact_override
from ldm.cli.run_folder import RunFolder, locked
from ldm.cli.sweep_space import Choice, Parameter, check_free, override, read_space
from ldm.cli.unread import refuse_unread

# Settings of the sweep itself; every other override is its trials'.
GROUPS = ("space", "search", "pruner")
SETTINGS = (
    *("num_trials", "num_workers", "objective", "direction", "take", "backend", "launcher", "devices", "retries"),
    *("poll_seconds", "grace_seconds", "sweep_id", "dry_run", "submitit"),
)
CHOICES = {"direction": ("minimize", "maximize"), "take": ("last", "best"), "backend": ("local", "submitit")}
# The exit code of a sweep without a finished trial.
NOTHING_FINISHED = 1


def sweep(config: DictConfig, overrides: Sequence[str]) -> None:
    """Runs a sweep, or goes on with it, and says what it found.

    Raises:
        UserError: a setting is wrong, or trials do not measure the objective.
        RunFailed: no trial finished, or checkpoints cannot be written.
        KeyboardInterrupt: a signal stopped it; the same command goes on.
    """
    check_settings(config)
    parameters = read_space(_plain(config, "space"))
    base = trial_overrides(overrides)
    check_runs(config)
    check_free(parameters, base)
    check_keys(parameters, base)
    # Optuna takes half a second to import, and is an extra.
    with user_mistakes():
        import optuna  # noqa: F401

        start = _starter(config, Path(config.paths.runs))
    if config.dry_run:
        _say_dry_run(config, parameters, base)
        return
    with _sigterm_interrupts():
        _prepare(base)
    folder = sweep_folder(config, parameters, base)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _run(folder, config, parameters, base, start)


def check_settings(config: DictConfig) -> None:
    """Refuses settings out of range.

    Raises:
        UserError: got, expected, remedy.
    """
    for key, choices in CHOICES.items():
        if config[key] not in choices:
            hint = did_you_mean(str(config[key]), list(choices))
            raise UserError(f"{key}: got {config[key]}, expected {' or '.join(choices)}{hint}")
    for key, smallest in {"num_trials": 1, "num_workers": 1, "retries": 0}.items():
        if not isinstance(config[key], int) or config[key] < smallest:
            raise UserError(f"{key}: got {config[key]}, expected a whole number from {smallest} on")
    if not config.objective:
        raise UserError("objective: got nothing, expected a column of metrics.csv, such as val/loss")
    if config.devices is not None and config.backend != "local":
        raise UserError("devices: got some for a cluster, which gives them itself; use submitit.gpus_per_node")
    if config.devices is not None and len(config.devices) != config.num_workers:
        raise UserError(
            f"devices: got {len(config.devices)} for num_workers={config.num_workers}, expected one entry a worker"
        )
    if config.submitit and config.backend != "submitit":
        raise UserError("submitit: got settings without backend=submitit; add it, or leave them out")
    if rank():
        raise UserError("ldm sweep starts its trials itself; run it alone, and give launcher='torchrun ...'")


def check_runs(config: DictConfig) -> None:
    """Refuses what would give all trials one folder, or a trial another folder each time that it is looked for.

    Raises:
        UserError: got, expected, remedy.
    """
    if config.run_id is not None:
        raise UserError(
            f"run_id: got {config.run_id}, which all trials would share, expected none: a trial's is made of its "
            "settings; name=NAME names them all, and sweep_id=NAME the sweep"
        )
    if config.resume == "never":
        raise UserError(
            "resume: got never, expected auto, or a checkpoint: a sweep finds a trial's run by its settings; name=NAME "
            "trains all of them anew"
        )


def trial_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides that are for the trials, not for the sweep."""
    own = (*GROUPS, *SETTINGS)
    return [item for item in overrides if item.lstrip("+~").partition("=")[0].partition(".")[0] not in own]


def check_keys(parameters: Sequence[Parameter], base: Sequence[str]) -> None:
    """Composes a trial for each value that a parameter names.

    Raises:
        UserError: there is no such setting or option, with the nearest one; or nothing reads it.
    """
    for parameter in parameters:
        for value in parameter.examples if isinstance(parameter, Choice) else parameter.examples[:1]:
            try:
                tried = [*base, override(parameter.key, value)]
                refuse_unread(compose_command("train", tried), tried)
            except UserError as error:
                raise UserError(f"space: {error}") from error


def sweep_folder(config: DictConfig, parameters: Sequence[Parameter], base: Sequence[str]) -> Path:
    """`<paths.runs>/<name>_sweep/<sweep id>`: the same experiment, space and objective have the same folder."""
    from ldm.cli.sweep_study import fingerprint

    trial = RunFolder.of(compose_command("train", base), command="train")
    search = OmegaConf.to_container(config.search)
    made = fingerprint(trial.settings, parameters, search, config.objective, config.direction, config.take, config.seed)
    return Path(trial.config.paths.runs) / f"{trial.config.name}_sweep" / str(config.sweep_id or made)


def command_prefix(config: DictConfig) -> list[str]:
    """What a trial's command begins with: its launcher, `train`, and where its configs are."""
    launcher = shlex.split(config.launcher) if config.launcher else [sys.executable, "-m", "ldm.cli.main"]
    return [*launcher, "train", *hydra_options()]


def _run(folder: Path, config: DictConfig, parameters: Sequence[Parameter], base: Sequence[str], start: Any) -> None:
    from ldm.cli.sweep_report import conclude, next_command
    from ldm.cli.sweep_run import Plan, Trials
    from ldm.cli.sweep_study import open_study

    (folder / "trials").mkdir(exist_ok=True)
    OmegaConf.save(OmegaConf.create(redact(OmegaConf.to_container(config))), folder / "sweep.yaml")
    study = open_study(
        folder,
        parameters,
        direction=config.direction,
        pruner=build(config.pruner),
        search=lambda seed: build(OmegaConf.create({**config.search, "seed": seed})),
        seed=config.seed,
    )
    done = len([trial for trial in study.trials if trial.state.is_finished()])
    heading(f"sweep of {config.name}: {done} of {config.num_trials} trials done ({shown(folder)})")
    plan = Plan(
        folder=folder,
        command=command_prefix(config),
        overrides=base,
        objective=config.objective,
        choose=_choose(config),
        num_trials=config.num_trials,
        workers=list(config.devices or [None] * config.num_workers),
        start=start,
        retries=config.retries,
        poll_seconds=config.poll_seconds,
        grace_seconds=config.grace_seconds,
    )
    try:
        Trials(study, plan).run()
    finally:
        best = conclude(folder, study, plan)
    if best is None:
        raise RunFailed(f"no trial of {shown(folder)} finished; trials.csv tells why", NOTHING_FINISHED)
    say("next:")
    say(f"  {next_command(folder, study, plan, hydra_options())}", style="bold")


def _choose(config: DictConfig) -> Callable[[list[float]], float]:
    if config.take == "last":
        return lambda values: values[-1]
    return min if config.direction == "minimize" else max


def _starter(config: DictConfig, runs: Path) -> Any:
    from ldm.cli.sweep_trial import start_local, submitit_starter

    if config.backend == "local":
        return start_local
    if config.dry_run:
        return None
    return submitit_starter(runs.absolute() / "submitit", _plain(config, "submitit"))


def _prepare(base: Sequence[str]) -> None:
    """Runs what the experiment requires, once for all trials, each in a process that leaves no memory behind."""
    register_resolver()
    links = plan_chain(compose_command("train", base))
    for number, link in enumerate(links, 1):
        with user_mistakes():
            folder = RunFolder.of(link.config, command=link.command)
        if not folder.finished:
            heading(f"[{number}/{len(links)}] {link.title}")
            _run_link(link.command, [*link.overrides, override("paths.runs", str(folder.path.parent.parent))])
        remember(folder)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Lets SIGTERM raise, as Ctrl-C does, so that the process that is waited for is stopped too."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run_link(command: str, overrides: Sequence[str]) -> None:
    words = [sys.executable, "-m", "ldm.cli.main", *command.split(), *hydra_options(), *overrides]
    # Of a session of its own, so that Ctrl-C reaches it once.
    with subprocess.Popen(words, start_new_session=True) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            raise
    if code:
        raise RunFailed(f"requires: `{command} {shlex.join(overrides)}` ended with code {code}", code)


def _say_dry_run(config: DictConfig, parameters: Sequence[Parameter], base: Sequence[str]) -> None:
    for link in plan_chain(compose_command("train", base)):
        say(f"first, if it is not there yet: ldm {link.title}")
    say(f"{config.num_trials} trials, {config.num_workers} at once, {config.backend}, each such as:")
    examples = [override(parameter.key, parameter.examples[0]) for parameter in parameters]
    say(f"  {shlex.join([*command_prefix(config), *map(redact_override, base), *examples])}", style="bold")
    if config.backend == "submitit":
        for key, value in _plain(config, "submitit").items():
            say(f"  submitit {key}: {value}")


def _plain(config: DictConfig, key: str) -> dict[str, Any]:
    """A node as a plain dict; empty where there is none."""
    return cast(dict[str, Any], OmegaConf.to_container(config[key])) if config.get(key) else {}
