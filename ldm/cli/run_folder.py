"""A run's folder: found again by the same command, held by one process, marked when finished."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.cli.console import rank, say
from ldm.cli.errors import UserError
from ldm.cli.lock import locked
from ldm.cli.provenance import environment, redact
from ldm.files import write_text

# Set for the ranks that Lightning starts itself: a run_id that is counted up must be the same for all.
RUN_ID_VARIABLE = "LDM_RUN_ID"
# What changes no result, and so leaves the run the same run.
WITHOUT_EFFECT = (
    "paths",
    "run_id",
    "run_dir",
    "resume",
    "requires",
    "inherit",
    "next_step",
    "card",
    # What it decides stands in the metrics too.
    "inception_weights",
    "device",
    "data.remote",
    "data.run_folder",
    "dataset.workers",
    "executor",
    "readers",
    "data.max_bad_fraction",
    "logger",
    "callback.progress",
    "callback.preemption",
    "callback.watchdog",
    "on_out_of_memory",
    "callback.self_check",
    "callback.throughput",
    "callback.sample_grid",
    "callback.reconstruction_grid",
    "callback.checkpoint.every_n_steps",
    "callback.checkpoint.keep",
    "data.allow_change",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "trainer.default_root_dir",
    # Batches are global: on more devices each takes a smaller share of the same steps.
    "trainer.devices",
    "trainer.num_nodes",
    "strategy.timeout",
    "strategy.timeout_minutes",
    "trainer.strategy.timeout",
    "trainer.strategy.timeout_minutes",
)
# The same, where the order of samples is a function of the position: that of a stream depends on its workers.
WITHOUT_EFFECT_INDEXED = ("data.num_workers", "data.workers", "data.cache")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, `<paths.runs>/<name>/<run_id>`.

    Args:
        path: the folder; it need not exist yet.
        command: the command that fills it, such as "train".
        config: the run's config with everything resolved.
        settings: eight digits of all that changes a result; where no run_id is given, they are its name.
    """

    path: Path
    command: str
    config: DictConfig
    settings: str

    @classmethod
    def of(cls, config: DictConfig, *, command: str, reserve: bool = False) -> RunFolder:
        """The run that a composed config describes; resolves the config in place.

        Args:
            reserve: whether `resume=never` makes its new folder at once, so that no other start finds the same one.

        Raises:
            ValueError: the name or the id cannot be a folder's, `resume` is a path that does not exist, or the seed is
                no whole number.
        """
        config.paths.runs = str(Path(config.paths.runs).expanduser().absolute())
        _check_resume(config)
        # Mistakes show here, and `result` notes which runs it means before `digest` hides the places.
        OmegaConf.to_container(config, resolve=True)
        if "seed" in config:
            config.seed = _whole_seed(config.seed)
        settings = digest(config)
        path = Path(config.paths.runs) / _safe("name", config.name) / _safe("run_id", config.run_id or settings)
        if config.get("resume") == "never":
            path = _unused(path, make=reserve)
        config.run_id, config.run_dir = path.name, str(path)
        OmegaConf.resolve(config)
        return cls(path, command, config, settings)

    @property
    def plain_config(self) -> dict[str, Any]:
        """The config as nested dicts and lists, with credentials hidden: what may be written down."""
        container: dict[str, Any] = redact(OmegaConf.to_container(self.config))
        return container

    @property
    def finished(self) -> bool:
        """Whether the result is there."""
        return (self.path / "result.json").is_file()

    def check_is_of_these_settings(self) -> None:
        """Refuses a finished run of a given run_id whose settings were others: its result is not what is asked for.

        Raises:
            UserError: they differ.
        """
        finished_with = json.loads((self.path / "result.json").read_text()).get("settings", self.settings)
        if finished_with != self.settings:
            raise UserError(
                f"run_id: got {self.path.name}, where a run with other settings is finished ({self.path}/config.yaml "
                "has them), expected another run_id; or leave it out"
            )

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @contextmanager
    def hold(self, command_line: str) -> Iterator[None]:
        """Makes the folder, takes it for this process alone, and records config, command and environment.

        A folder that was made only to find that a setting is wrong goes again.

        Raises:
            UserError: another process holds it.
        """
        if rank():
            yield
            return
        fresh = not self.path.exists() or not any(self.path.iterdir())
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            self._record(command_line)
            try:
                yield
            except UserError:
                if fresh and not self.checkpoints.exists() and next(self.path.glob("*/*.tar"), None) is None:
                    shutil.rmtree(self.path)
                    with suppress(OSError):  # other runs of this name are there
                        self.path.parent.rmdir()
                raise

    def finish(self, result: dict[str, Any]) -> None:
        """Writes result.json, the mark of a finished run, last and whole."""
        if rank() == 0:
            head = {"command": self.command, "name": self.path.parent.name, "run_id": self.path.name}
            write_json(self.path / "result.json", {**head, "settings": self.settings, **result})

    def checkpoint_to_resume(self) -> Path | str | None:
        """The newest valid checkpoint, or what `resume` names, or None for a fresh start; sets damaged ones aside."""
        # Torch takes seconds to import, and most of what a run folder does needs none of it.
        from ldm.training.checkpoint_folders import newest_valid, sweep

        place = OmegaConf.select(self.config, "callback.checkpoint.folder") or self.checkpoints
        if rank() == 0:
            sweep(place)
        newest = newest_valid(place, on_damaged=_set_aside)
        asked = self.config.get("resume")
        if newest is not None or asked in (None, "auto", "never"):
            return newest
        return newest_checkpoint(asked if "://" in str(asked) else Path(asked))

    def _record(self, command_line: str) -> None:
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.plain_config)))
        with (self.path / "command.txt").open("a") as file:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')}  {command_line}\n")
        write_json(self.path / "environment.json", environment())


def digest(config: DictConfig) -> str:
    """Eight hexadecimal digits of what decides the result: the resolved config without places and displays."""
    probe = copy.deepcopy(config)
    # Not of a place of the user's own, such as paths.data: elsewhere other data may lie.
    probe.paths.runs = "<runs>"
    probe.run_id, probe.run_dir = "<run_id>", "<run_dir>"
    if "checkpoint_io" in probe:
        probe.checkpoint_io = "<checkpoint_io>"
    start = config.get("resume")
    OmegaConf.resolve(probe)
    container = redact(OmegaConf.to_container(probe))
    is_indexed = (container.get("data") or {}).get("mode", "indexed") == "indexed"
    for key in (*WITHOUT_EFFECT, *(WITHOUT_EFFECT_INDEXED if is_indexed else ())):
        _drop(container, key)
    if start not in (None, "auto", "never"):
        container["resume"] = start if "://" in str(start) else str(Path(start).absolute())
    text = json.dumps(container, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def finished_runs(runs: Path, *, name: str | None = None) -> list[Path]:
    """Folders of finished runs under `runs`, the newest first; of one name, if given."""
    marks = runs.glob(f"{name or '*'}/*/result.json")
    return [mark.parent for mark in sorted(marks, key=lambda mark: mark.stat().st_mtime, reverse=True)]


def latest_finished(
    runs: Path, *, name: str | None = None, accept: Callable[[Path], bool] = lambda folder: True
) -> Path | None:
    """The newest finished run that `accept` accepts, or None."""
    return next(filter(accept, finished_runs(runs, name=name)), None)


def run_folder_of(path: Path) -> Path | None:
    """The run folder that a run folder, a checkpoint or a weights file belongs to, or None."""
    return next((folder for folder in (path, *path.parents) if (folder / "config.yaml").is_file()), None)


def newest_checkpoint(path: Path | str) -> Path | str:
    """The checkpoint itself, or the newest valid one of a run folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    from ldm.training.checkpoint_files import Damaged, verify
    from ldm.training.checkpoint_folders import child, find, is_checkpoint

    reason = "there is no checkpoint"
    for candidate in [path] if is_checkpoint(path) else find(child(path, "checkpoints")):
        try:
            verify(candidate)
        except Damaged as damage:
            reason = str(damage)
        else:
            return candidate
    raise ValueError(f"resume: got {path}, expected a whole checkpoint or a run folder with one; {reason}")


def _set_aside(place: Path | str, reason: str) -> None:
    """Keeps a damaged checkpoint where nothing takes it for one, and says so."""
    from ldm.training.checkpoint_folders import set_aside

    kept = f"; it is kept as {set_aside(place)}" if rank() == 0 else ""
    say(f"{Path(place).name} is damaged; going back to an older checkpoint ({reason}{kept})", style="yellow")


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file in one move; tensors and NumPy numbers become plain ones, paths become text."""
    write_text(path, json.dumps(content, indent=2, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _check_resume(config: DictConfig) -> None:
    asked = config.get("resume")
    if asked not in (None, "auto", "never") and "://" not in str(asked) and not Path(str(asked)).exists():
        raise ValueError(
            f"resume: got {asked}, which does not exist; expected auto, never, a checkpoint or a run folder"
        )


def _whole_seed(seed: object) -> int:
    """The seed as a number, which one that an environment variable holds is not."""
    number = int(seed) if isinstance(seed, str) and seed.isdecimal() else seed
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"seed: got {seed!r}, expected a whole number from 0 on")
    return number


def _safe(key: str, name: object) -> str:
    """A name that cannot lead out of its folder."""
    if not name or not _SAFE_NAME.fullmatch(str(name)):
        raise ValueError(f"{key}: got {name!r}, expected letters, digits and _.+-, as it names a folder")
    return str(name)


def _unused(path: Path, *, make: bool) -> Path:
    """The folder itself, or the first of path-2, ... that does not exist; one for all ranks of a run."""
    if rank() and RUN_ID_VARIABLE in os.environ:
        return path.with_name(os.environ[RUN_ID_VARIABLE])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "resume: got never under a launcher, where ranks cannot agree on a new folder; give run_id=NAME"
        )
    number, candidate = 1, path
    while not _is_new(candidate, make=make):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _is_new(path: Path, *, make: bool) -> bool:
    """Whether nothing is there yet; of two that make it in the same moment one finds it taken."""
    if not make:
        return not path.exists()
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _drop(container: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    node: Any = container
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(last, None)
