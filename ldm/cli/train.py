"""`ldm train`: builds model, data and trainer from the config, trains, and writes down the result."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.cli.build import build, build_all, build_later
from ldm.cli.chain import run_chain, shown
from ldm.cli.console import CHECK_FAILED, DATA_FAULTS, DIVERGED, STORAGE, heading, rank, say
from ldm.cli.errors import Interrupted, RunFailed, UserError, mistake, user_mistakes
from ldm.cli.evaluate_parts import evaluate_at_end
from ldm.cli.memory import OUT_OF_MEMORY, check_memory, halve, remedies
from ldm.cli.run_folder import RunFolder
from ldm.cli.sampling import open_pipeline
from ldm.cli.unread import refuse_unread


def train(config: DictConfig, overrides: Sequence[str]) -> None:
    """Runs the chain of an experiment, then says where everything is and what to type next.

    Raises:
        UserError: something is chosen that nothing reads, or cannot be built.
    """
    refuse_unread(config, overrides)
    folder = run_chain("train", config, overrides)
    if rank() == 0:
        report(folder)


def produce(folder: RunFolder) -> dict[str, Any]:
    """Trains into a run folder and returns what `finish` and the evaluation found.

    Raises:
        UserError: something cannot be built.
        KeyboardInterrupt: a signal stopped the run; a checkpoint is saved.
        RunFailed: training diverged, checkpoints cannot be written, or the data are too bad.
    """
    config = folder.config
    for part in ("model", "data"):
        if config.get(part) is None:
            raise UserError(
                f"{part}: experiment {config.name} sets none, so there is nothing to train; choose {part}=..."
            )
    # Torch and Lightning take seconds to import: only from here on are they needed.
    from ldm.training.fit import leave_group

    # Built before training, so that a mistake in it shows now, and before seeding, so that it changes nothing.
    node = config.get("evaluation")  # which ~evaluation takes away
    evaluation = build(node) if node and "_target_" in node else None
    check_memory(config)
    with data_faults():
        model, data = _trained(folder)
        summary = model.eval().finish(folder.path, data=data, config=folder.plain_config)
    leave_group()
    if rank():
        return {}
    if evaluation is None:
        return {"summary": summary}
    heading("evaluating")
    figures = evaluate_at_end(evaluation, open_pipeline(folder.path, None), folder.path)
    return {"summary": summary, "evaluation": figures}


def report(folder: RunFolder) -> None:
    """Says where everything is and what to type next."""
    result = json.loads((folder.path / "result.json").read_text())
    heading(f"{result['name']}: finished in {duration(result['seconds'])}")
    say(f"  run folder  {shown(folder.path)}")
    for name in ("metrics.csv", "result.json"):
        if (folder.path / name).is_file():
            say(f"  {name:<11} {shown(folder.path / name)}")
    for part in ("summary", "evaluation"):
        for line in table(result.get(part) or {}):
            say(f"  {line}")
    if folder.config.next_step:
        say("next:")
        say(f"  {folder.config.next_step}", style="bold")


def table(values: dict[str, Any]) -> list[str]:
    """Lines of `name  value`, nested names joined by dots."""
    rows = list(_rows(values))
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _rows(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _rows(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            rows.append((f"{prefix}{name}", f"{value:.4g}" if isinstance(value, float) else str(value)))
    return rows


def _say_data(data: Any) -> None:
    """Says which shards are trained on, which may be those of the newest run that wrote some."""
    from ldm.data import ShardDataModule

    if not isinstance(data, ShardDataModule):
        return
    first, *others = data.places("train")
    with user_mistakes():
        num_samples = len(data.dataset("train"))
    more = f" and {len(others)} more folders" if others else ""
    say(f"data: {first if '://' in first else shown(Path(first))}{more}, {num_samples} samples", style="dim")


@contextmanager
def data_faults() -> Iterator[None]:
    """Turns data that are too bad, or cannot be fetched, into a `RunFailed`, whatever noticed it."""
    from ldm.data.decoding import CorruptSampleError, UnreachableError
    from ldm.data.ledger import BadDataError

    try:
        yield
    except (UserError, BadDataError, CorruptSampleError, UnreachableError) as error:
        cause = error.__cause__ if isinstance(error, UserError) else error
        while isinstance(cause, Exception) and type(cause).__name__ in ("SetupError", "InstantiationException"):
            cause = cause.__cause__
        if not isinstance(cause, BadDataError | CorruptSampleError | UnreachableError):
            raise
        raise RunFailed(str(cause), DATA_FAULTS) from error


def _trained(folder: RunFolder) -> tuple[Any, Any]:
    """The model, trained to the end, and its data; in smaller pieces where memory runs out and the run asks for that.

    Raises:
        RunFailed: training ran out of memory.
    """
    from ldm.training.fit import seed_everything
    from ldm.training.memory import OutOfMemory, release

    while True:
        seed_everything(folder.config.seed)
        model = build(folder.config.model)
        checkpoint = _checkpoint(folder, model)
        if folder.config.get("start_from") and not checkpoint:
            _start_from(folder, model)
        data = build(folder.config.data)
        _say_data(data)
        try:
            _fit(folder, model, data, checkpoint)
            return model, data
        except OutOfMemory as error:
            line, hint = str(error), remedies(folder.config)
            halved = halve(folder.config)
            if halved is None:
                raise RunFailed(line + hint, OUT_OF_MEMORY, alone=True) from error
        say(f"{line}; going on with {halved}", style="yellow")
        del model, data
        release()


def _start_from(folder: RunFolder, model: Any) -> None:
    """Lets the model begin with what an earlier run learned."""
    from ldm.training.start_from import start_from

    place = Path(str(folder.config.start_from)).expanduser()
    with user_mistakes():
        grown = start_from(model, place)
    more = f"; what is new in {', '.join(grown)} starts at zero" if grown else ""
    say(f"starting from {shown(place)}{more}", style="dim")


def _checkpoint(folder: RunFolder, model: Any) -> Any:
    """The checkpoint to go on from, if there is one: of this very model, which shows before data are opened."""
    from ldm.training.compatibility import refuse_other_model

    with user_mistakes():
        checkpoint = folder.checkpoint_to_resume()
        if checkpoint:
            refuse_other_model(model, checkpoint)
    return checkpoint


def _fit(folder: RunFolder, model: Any, data: Any, checkpoint: Any) -> None:
    from ldm.training.fit import Diverged, Preempted, SetupError, StorageError, fit
    from ldm.training.honesty import RanksDisagree
    from ldm.training.ranks import OtherRankFailed

    config = folder.config
    callbacks, loggers = build_all(config.callback), build_all(config.logger)
    if checkpoint:
        say(f"going on from {shown(checkpoint)}")
    try:
        ended = fit(
            build_later(config.trainer),
            model,
            data=data,
            config=folder.plain_config,
            callbacks=callbacks,
            loggers=loggers,
            checkpoint=checkpoint,
        )
    except SetupError as error:
        cause = error.__cause__ or error
        line = mistake(cause)
        if line is None:
            raise cause from None
        raise UserError(line) from error
    except OtherRankFailed:
        raise SystemExit(1) from None
    except Diverged as error:
        raise RunFailed(str(error), DIVERGED) from error
    except RanksDisagree as error:
        raise RunFailed(str(error), CHECK_FAILED) from error
    except StorageError as error:
        raise RunFailed(str(error), STORAGE) from error
    except Preempted as stop:
        _say_stopped(folder, reason=f" by {stop.number.name}" + (", and back in the queue" if stop.requeued else ""))
        raise Interrupted from stop
    if not ended:
        _say_stopped(folder)
        raise KeyboardInterrupt


def _say_stopped(folder: RunFolder, *, reason: str = "") -> None:
    saved = folder.checkpoint_to_resume()
    program, *arguments = sys.argv
    command = ["python", program] if program.endswith(".py") else [Path(program).name]
    state = (
        f"saved {shown(saved)}; the same command goes on from there" if saved else "no checkpoint was saved; start anew"
    )
    say(f"stopped{reason}; {state}:")
    say(f"  {shlex.join([*command, *arguments])}", style="bold")
