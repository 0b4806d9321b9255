"""`ldm evaluate` in several processes: each of them runs the same evaluation, and they share its tasks out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from omegaconf import DictConfig, OmegaConf

from ldm.cli.build import build
from ldm.cli.console import say
from ldm.cli.errors import user_mistakes


@dataclass(frozen=True)
class Join:
    """Work of as many tasks as there are processes, each of which is to take part in one evaluation.

    Args:
        measure: measures as a config says: a function of a module, which other processes can import.
        config: of the evaluation, its folder named.
        marks: folder of the marks that say which process has taken part.
        num_tasks: processes.
    """

    measure: Callable[[DictConfig], Any]
    config: dict[str, Any]
    marks: Path
    num_tasks: int

    def is_done(self, task: int) -> bool:
        """Whether a process has come to the end of the evaluation."""
        return (self.marks / f"{task:03d}").is_file()

    def do(self, task: int) -> None:
        """Takes part until everything is done, by whomever."""
        self.measure(OmegaConf.create(self.config))
        self.marks.mkdir(parents=True, exist_ok=True)
        (self.marks / f"{task:03d}").touch()


def is_elsewhere(config: DictConfig) -> bool:
    """Whether the chosen executor computes in other processes than this one."""
    return not _plain_executor(config).is_here


def in_other_processes(config: DictConfig, out: Path, measure: Callable[[DictConfig], Any]) -> None:
    """Returns when the processes of the executor have filled the evaluation's folder.

    Raises:
        UserError: a setting of the executor is wrong.
    """
    config.run_dir = str(out.absolute())
    plain: Any = OmegaConf.to_container(config, resolve=True)
    executor = build(config.executor)
    count = int(config.executor.get("workers") or config.executor.get("jobs") or 1)
    plain |= {"out": str(out.absolute()), "executor": {"_target_": "ldm.generation.executors.Local", "workers": 0}}
    for key in ("checkpoint", "images"):
        if plain[key] is not None:
            plain[key] = str(Path(plain[key]).expanduser().absolute())
    work = Join(measure, plain, out.absolute() / ".locks" / uuid4().hex, count)
    say(f"  {count} processes at work", style="dim")
    with user_mistakes():
        executor.run(work)


def _plain_executor(config: DictConfig) -> Any:
    if config.run_dir is None:
        config.run_dir = "."
    return build(config.executor)
