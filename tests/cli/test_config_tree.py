"""Every file under conf/ composes, and every `_target_` in it exists and takes the arguments it is given."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from ldm.cli.chain import plan
from ldm.cli.compose import conf_folder, config_name
from ldm.cli.main import COMMANDS

CONF = conf_folder()
FILES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml"))
# Cards are composed and bound once each, by `ldm papers --check`: tests/cli/test_papers_command.py.
CARDS = [file for file in FILES if file.startswith("experiment/paper/")]
PARTS = [file for file in FILES if "/" in file and not file.startswith("hydra/") and file not in CARDS]
EXPERIMENTS = [file.removeprefix("experiment/") for file in PARTS if file.startswith("experiment/")]
# Groups that only this command composes.
COMMAND_OF_GROUP = {
    "dataset": "shard",
    "filter": "data filter",
    "executor": "data encode",
    "task": "sample",
    "memory": "sample",
    "postprocess": "sample",
    "metric": "evaluate",
    "launch": "launch",
    "space": "sweep",
    "search": "sweep",
    "pruner": "sweep",
    "hardware": "plan",
    "interconnect": "plan",
}
# Arguments that the caller adds to a node's own: `write_digits(folder, ...)`.
ADDED_BY_CALLER = {"dataset": 1}


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    OmegaConf.register_new_resolver("result", lambda name: f"<result of {name}>", replace=True)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def compose_part(file: str) -> DictConfig:
    group, option = file.split("/", 1)
    if group == "experiment":
        return compose(command_of(option), overrides=[f"experiment={option}"])
    if group == "scale":
        return compose("train", overrides=["experiment=paper/ldm4_celebahq", f"+{group}={option}"])
    choice = f"{group}=[{option}]" if group in ("callback", "metric") else f"{group}={option}"
    if group in COMMAND_OF_GROUP:
        return compose(config_name(COMMAND_OF_GROUP[group]), overrides=[choice])
    # By itself: an experiment adds settings of its own to the parts that it chose.
    return compose("train", overrides=["~experiment", choice])


def command_of(experiment: str) -> str:
    """An experiment without a model is not for training but for encoding."""
    return "train" if "model" in compose("train", overrides=[f"experiment={experiment}"]) else "data_encode"


def targets(node: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every nested node with a `_target_`, by its place."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    if isinstance(node, dict) and "_target_" in node:
        yield place, node
    for key, value in items:
        yield from targets(value, f"{place}.{key}" if place else str(key))


def bind(place: str, node: dict[str, Any]) -> None:
    """Binds a node's settings to its target's signature; a partial one may leave some out."""
    target = get_object(node["_target_"])
    settings = {key: value for key, value in node.items() if not key.startswith("_")}
    if getattr(target, "__module__", "") == "datetime":
        target(**settings)  # written in C, without a signature to bind to
        return
    signature = inspect.signature(target)
    if node.get("_partial_"):
        signature.bind_partial(**settings)
    else:
        signature.bind(*[None] * ADDED_BY_CALLER.get(place, 0), **settings)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes_and_its_targets_take_their_settings(command: str) -> None:
    for place, node in targets(OmegaConf.to_container(compose(config_name(command)))):
        bind(place, node)


@pytest.mark.parametrize("file", PARTS)
def test_every_part_composes_and_its_targets_take_their_settings(file: str) -> None:
    found = list(targets(OmegaConf.to_container(compose_part(file))))
    assert found
    for place, node in found:
        bind(place, node)


@pytest.mark.parametrize("file", PARTS)
def test_every_part_says_where_it_goes(file: str) -> None:
    first = (CONF / f"{file}.yaml").read_text().splitlines()[0]
    group, _ = file.split("/", 1)
    # `auto` is a word, not a node, which only the root can hold; tasks and memory set more than one node.
    at_root = dict.fromkeys(("experiment", "debug", "strategy", "task", "memory", "launch", "scale"), "_global_")
    expected = {**at_root, "callback": "callback.\\w+", "postprocess": "postprocess.\\w+", "metric": "metric.\\w+"}
    assert re.fullmatch(f"# @package {expected.get(group, group)}", first)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_resolves_and_names_itself(experiment: str) -> None:
    config = compose(command_of(experiment), overrides=[f"experiment={experiment}", "run_dir=folder", "run_id=id"])
    assert config.name == experiment.replace("/", "_")
    missing = OmegaConf.missing_keys(config)
    assert missing == set()
    OmegaConf.resolve(config)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_requires_commands_that_compose(experiment: str) -> None:
    config = compose(command_of(experiment), overrides=[f"experiment={experiment}"])
    assert len(plan(config)) >= len(config.requires)


@pytest.mark.parametrize("task", sorted((CONF / "task").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_setting_of_a_task_has_the_name_of_a_group(task: Path) -> None:
    """Of `scale=2` Hydra would take the 2 for an option of the group."""
    settings = OmegaConf.load(task).keys() - {"defaults", "task", "sampler", "guidance"}
    assert not {name for name in settings if (CONF / str(name)).is_dir()}


def test_every_file_is_composed_by_one_of_these_tests() -> None:
    primaries = [file for file in FILES if "/" not in file]
    names = [config_name(command) for command in COMMANDS]
    assert sorted(primaries) == sorted(names)
    settings_of_hydra = [file for file in FILES if file.startswith("hydra/")]
    assert settings_of_hydra == sorted(["hydra/output/none", *(f"hydra/help/{name}" for name in names)])
    assert sorted([*primaries, *settings_of_hydra, *PARTS, *CARDS]) == FILES


def test_an_installed_package_finds_the_same_tree() -> None:
    package = Path(inspect.getfile(get_object("ldm.cli.main.main"))).resolve().parent.parent
    assert CONF in (package / "conf", package.parent / "conf")
