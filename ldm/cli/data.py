"""`ldm data index | validate | filter | report | encode`: what is done to shards before training on them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from ldm.cli.build import build
from ldm.cli.chain import shown
from ldm.cli.console import heading, say
from ldm.cli.errors import RunFailed, UserError, closest, user_mistakes

if TYPE_CHECKING:
    from ldm.data.validate import Verdict

# The exit code where shards have faults.
FAULTS_FOUND = 1
# Seconds between two words about progress.
EVERY = 10.0


def index(config: DictConfig, overrides: Sequence[str]) -> None:
    """Writes an index beside each shard.

    Raises:
        UserError: a setting is wrong.
        RunFailed: a shard cannot be read.
    """
    from ldm.data.manifest import index_shards

    with user_mistakes():
        sums = index_shards(
            _shards(config), sha256=config.sha256, force=config.force, workers=config.workers, progress=Progress()
        )
    heading(f"{sums['num_shards']} shards: {sums['num_samples']:,} samples, {sums['bytes']:,} bytes")
    if sums["num_bad"]:
        say(f"  {sums['num_bad']} faults in their headers; `ldm data validate` tells them all")
    wrong = {"cannot be read": sums["unusable"], "are cut off, and read up to there": sums["cut_off"]}
    if told := [f"shards that {what}: {', '.join(paths)}" for what, paths in wrong.items() if paths]:
        raise RunFailed("; ".join(told), FAULTS_FOUND)


def validate(config: DictConfig, overrides: Sequence[str]) -> None:
    """Looks at every member of every shard, and tells what is wrong with it.

    Raises:
        UserError: a setting is wrong.
        RunFailed: there are faults that are not accepted.
    """
    from ldm.data.faults import KINDS
    from ldm.data.validate import Checks, validate_shards

    for kind in config.accept:
        if kind not in KINDS:
            hint = closest(kind, list(KINDS))
            raise UserError(f"accept: got {kind}, expected kinds such as {hint or ', '.join(KINDS)}")
    with user_mistakes():
        checks = Checks(decode=config.decode, min_side=config.min_side)
        verdict = validate_shards(_shards(config), checks=checks, workers=config.workers, progress=Progress())
        if config.out is not None:
            Path(config.out).write_text(json.dumps(verdict.as_json(), indent=1))
    _tell(verdict, accepted=list(config.accept), limit=config.show)
    failing = [kind for kind in verdict.counts if kind not in config.accept]
    if failing:
        raise RunFailed(f"{sum(verdict.counts[kind] for kind in failing)} faults: {', '.join(failing)}", FAULTS_FOUND)


def filter(config: DictConfig, overrides: Sequence[str]) -> None:
    """Judges every sample by its metadata, and writes which are kept or the kept ones themselves.

    Raises:
        UserError: a setting is wrong, a column is missing, or a null leaves a sample undecided.
    """
    from ldm.data.filtering import filter_shards

    chosen = build(config.filter)
    out = _path(config, "out")
    settings = {"write": config.write, "metadata": config.metadata, "workers": config.workers}
    with user_mistakes():
        summary = filter_shards(_shards(config), chosen, out, **settings)
    total, kept = summary["num_samples"], summary["kept"]
    heading(f"{kept:,} of {total:,} samples kept ({kept / max(total, 1):.1%})")
    for text, failed, unknown in zip(chosen.texts, summary["failed"], summary["unknown"], strict=False):
        say(f"  {text:<40} false {failed:>10,}   null {unknown:>10,}")
    if summary["num_unreadable"]:
        name, reason = next(iter(summary["unreadable"].items()))
        say(f"  {summary['num_unreadable']:,} without readable metadata, left out: {name} ({reason}), ...")
    if not kept:
        say("nothing is kept, so there is nothing to train on; filter.where asks too much", style="yellow")
        return
    use = f"data.filter={shown(out.absolute())}" if config.write == "keys" else f"data.train={shown(out.absolute())}"
    say(f"train on them with {use}")


def report(config: DictConfig, overrides: Sequence[str]) -> None:
    """Measures shards, and writes a page.

    Raises:
        UserError: a setting is wrong, or a shard cannot be read.
    """
    from ldm.data.report import PAGE, report_shards

    out, names = _path(config, "out"), ("rows", "pictures", "thumbnails", "distance", "metadata", "workers")
    filters = {str(name): build(node) for name, node in config.filters.items() if node is not None}
    with user_mistakes():
        settings = {name: config[name] for name in names}
        summary = report_shards(_shards(config), out, filters=filters, progress=Progress(), **settings)
    heading(f"{len(summary['shards'])} shards: {summary['num_samples']:,} samples")
    for told in summary["shards_unreadable"]:
        say(f"  left out: {told}")
    say(f"report: {shown((out / PAGE).absolute())}")


def encode(config: DictConfig, overrides: Sequence[str]) -> None:
    """Encodes pictures and captions; see `ldm.cli.data_encode`."""
    from ldm.cli import data_encode

    data_encode.encode(config, overrides)


class Progress:
    """Says now and then how many shards are done."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._told >= EVERY and done < total:
            self._told = time.monotonic()
            say(f"  {done:,} of {total:,} shards")


def _shards(config: DictConfig) -> str | list[str]:
    """The shards to look at.

    Raises:
        UserError: none are named.
    """
    if config.shards is None:
        raise UserError("shards: got none; write shards=FOLDER")
    return _plain(config.shards)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig) else str(value)


def _path(config: DictConfig, name: str) -> Path:
    if config[name] is None:
        raise UserError(f"{name}: got none; write {name}=FOLDER")
    return Path(config[name])


def _tell(verdict: Verdict, *, accepted: Sequence[str], limit: int) -> None:
    """Prints the first faults, and a table of all by kind."""
    from ldm.data.faults import KINDS

    for fault in verdict.faults[:limit]:
        place = f"{fault.shard}: {fault.key}" if fault.key else fault.shard
        say(f"{place}: {fault.kind}: {fault.reason}".encode(errors="backslashreplace").decode())
    if len(verdict.faults) > limit:
        say(f"... and {len(verdict.faults) - limit:,} more (show=..., out=FILE.json)")
    heading(f"{verdict.num_shards} shards, {verdict.num_samples:,} samples, {len(verdict.faults):,} faults")
    for kind, count in verdict.counts.items():
        mark = " (accepted)" if kind in accepted else ""
        say(f"  {kind:<18}{count:>8,}  {KINDS[kind].outcome:<10} {KINDS[kind].meaning}{mark}")
