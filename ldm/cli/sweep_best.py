"""The best trial of a sweep as an experiment: `experiment/best.yaml`, which `ldm train` composes to the same run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from ldm.cli.compose import group_options
from ldm.cli.provenance import redact

_SEARCH_PATH = "hydra.searchpath="
# Of the command line, not of the experiment.
_NOT_KEPT = ("paths", "run_id", "run_dir", "resume")
# Groups that are laid over an experiment, which cannot override them: it begins from theirs instead.
_LAID_OVER = ("debug",)


def write_best(folder: Path, overrides: Sequence[str], *, title: str) -> Path:
    """Writes `folder/experiment/best.yaml`: the experiment, the groups and settings that the overrides chose.

    Args:
        folder: the sweep's, which `--config-dir` names.
        overrides: of the best trial.
        title: the first comment.
    """
    path = folder / "experiment" / "best.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(_text(overrides, title=title))
    return path


def beside_the_experiment(overrides: Sequence[str]) -> list[str]:
    """Overrides that stay on the command line: where runs are, and what takes a setting away."""
    kept = []
    for item in overrides:
        key = item.lstrip("+~").partition("=")[0]
        is_deletion = item.startswith("~") and not _is_group(key)
        if is_deletion or key.partition(".")[0] in _NOT_KEPT:
            kept.append(item)
    return kept


def best_command(folder: Path, hydra_options: Sequence[str], overrides: Sequence[str]) -> str:
    """The command that trains `best.yaml`; configs that lay elsewhere join through Hydra's search path."""
    words = ["ldm", "train", "--config-dir", str(folder), "experiment=best", *beside_the_experiment(overrides)]
    elsewhere = [f"file://{value}" for option, value in pairwise(hydra_options) if option == "--config-dir"]
    for item in hydra_options:
        if item.startswith(_SEARCH_PATH):
            elsewhere.append(item.removeprefix(_SEARCH_PATH).strip("[]"))
    return shlex.join([*words, *([f"{_SEARCH_PATH}[{','.join(elsewhere)}]"] if elsewhere else [])])


def _text(overrides: Sequence[str], *, title: str) -> str:
    parsed = OverridesParser.create(config_loader=_loader()).parse_overrides(list(overrides))
    full = compose("train", overrides=list(overrides), return_hydra_config=True)
    experiment = full.hydra.runtime.choices.get("experiment")
    defaults = [*([str(experiment)] if experiment else []), *_group_overrides(parsed), "_self_"]
    values = OmegaConf.to_container(full, resolve=False)
    settings: dict[str, Any] = {"name": _look_up(values, "name") or (experiment or "best").replace("/", "_")}
    for item in parsed:
        key = item.key_or_group
        if not _is_group(key) and not item.is_delete() and key.partition(".")[0] not in (*_NOT_KEPT, "name"):
            _put(settings, key, _look_up(values, key))
    body = OmegaConf.to_yaml(OmegaConf.create({"defaults": defaults, **redact(settings)}))
    return f"# @package _global_\n# {title}\n{body}"


def _group_overrides(parsed: Sequence[Override]) -> Iterator[Any]:
    for item in parsed:
        group = item.key_or_group
        if _is_group(group) and group != "experiment":
            place = f"/{group}@{item.package}" if item.package else f"/{group}"
            value = None if item.is_delete() else item.value()
            if group in _LAID_OVER:
                yield {f"/{group}@_global_": value}
            else:
                yield {place: value} if item.is_add() else {f"override {place}": value}


def _is_group(key: str) -> bool:
    return bool(group_options(key))


def _loader() -> ConfigLoader:
    return GlobalHydra.instance().config_loader()


def _look_up(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _put(node: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
