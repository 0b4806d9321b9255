"""Composes a command's config and says a wrong override in one line that names the nearest right one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict

from ldm.cli.errors import UserError, closest, did_you_mean, mistake, one_line

# How alike two names must be for `+name` to count as a slip of the pen: max_stepz and max_steps are, max_time is not.
SLIP = 0.8
# The value of a setting that has to be given, which says nothing of its type.
MISSING = "???"
# Extras that install Hydra's launchers.
LAUNCHER_EXTRAS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm"}


def conf_folder() -> Path:
    """The Hydra tree: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent.parent
    shipped = package / "conf"
    return shipped if shipped.is_dir() else package.parent / "conf"


def config_name(command: str) -> str:
    """The primary config of a command: conf/data_index.yaml of `ldm data index`."""
    return command.replace(" ", "_")


def compose_command(command: str, overrides: Sequence[str]) -> DictConfig:
    """Composes `ldm <command> <overrides>` inside the running Hydra.

    Raises:
        UserError: an override is wrong.
    """
    try:
        config = compose(config_name(command), overrides=list(overrides), return_hydra_config=True)
    except HydraException as error:
        raise UserError(explain(error, command, overrides)) from error
    choices = config.hydra.runtime.choices
    with open_dict(config):
        del config["hydra"]
    return checked(command, config, overrides, choices=choices)


def checked(command: str, config: DictConfig, overrides: Sequence[str], *, choices: Mapping[str, Any]) -> DictConfig:
    """The composed config, with its run's name filled in, after the checks that Hydra itself does not make.

    Raises:
        UserError: a `+key` is next to an existing one, or a value is of the wrong type.
    """
    check_overrides(command, overrides, config)
    if "name" in config and config.name is None:
        # It names a folder: finetune_mine of experiment=finetune/mine.
        config.name = str(choices.get("experiment") or choices.get("dataset") or "").replace("/", "_") or None
    if command != "sample" and config.get("scale"):  # a task of sampling has a scale of its own
        from ldm.cli.tiny import shrink

        shrink(config)
    return config


def explain_after_shutdown(error: Exception, command: str, overrides: Sequence[str], *, config_dir: str | None) -> str:
    """`explain` for an error that Hydra's entry point raised: it takes its global state down on the way out."""
    extra = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return explain(error, command, [*overrides, *extra])


def explain(error: Exception, command: str, overrides: Sequence[str]) -> str:
    """One line for a composition error, with the nearest valid name."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: Hydra cannot read this; write key=value, and quote text with signs: key='\"a, b\"'"
    for item in overrides:
        if isinstance(error, ValueError) and item.endswith("=null") and _is_group(item.removesuffix("=null")):
            return f"{item}: a group cannot be set to null; leave it out with ~{item.removesuffix('=null')}"
    if isinstance(error, MissingConfigException):
        return _explain_missing_option(error, overrides)
    if (deleted := re.search(r"Could not delete '([^'=@.]+)'", text)) and _is_group(deleted[1]):
        return f"~{deleted[1]}: a list of this group, or no choice at all; leave all of it out with {deleted[1]}=[]"
    if several := re.search(r"Multiple values for ([\w/]+)\.", text):
        return f"{several[1]}: this group has its choice already; choose another with {several[1]}=..., without a +"
    if unknown := re.search(r"Could not (?:override|delete from config\.|delete) '([^'=@]+)", text):
        inner = re.search(r"full_key: (\S+)", str(error.__cause__))
        if inner and inner[1].startswith(f"{unknown[1]}."):  # of a mapping: key={inner: 1}
            return f"{unknown[1]}: it has no {inner[1].removeprefix(f'{unknown[1]}.')} yet; write +{unknown[1]}={{...}}"
        return _explain_unknown_key(unknown[1], command, overrides)
    if ambiguous := re.search(r"Ambiguous value for argument '(.+?)'\n", text):
        return f"{ambiguous[1]}: several values; add -m to run each of them, or write one list: key=[a,b]"
    if present := re.search(r"An item is already at '(.+?)'", text):
        return f"+{present[1]}: this key exists already; leave out the +"
    cause = mistake(error.__cause__) if error.__cause__ else None
    return "; ".join(part for part in (mistake(error) if text else "", cause) if part)


def check_overrides(command: str, overrides: Sequence[str], config: DictConfig) -> None:
    """Refuses what Hydra lets through: a `+key` like an existing key, and text where the default is a number.

    A number that means the default's type gets it, in place: 1e4 of steps is 10000, a precision of 32 is "32".

    Raises:
        UserError: with the nearest key, or the type expected.
    """
    parser = OverridesParser.create(config_loader=_loader())
    parsed = [
        override
        for override in parser.parse_overrides(list(overrides))
        if not override.is_force_add() and not _is_group(override.key_or_group)
    ]
    if not parsed:
        return
    plain = _without_values(command, overrides)
    for override in parsed:
        if override.is_add():
            _refuse_slip(override, plain)
        elif not override.is_delete():
            _refuse_wrong_type(override, plain, config)
            _fit_to_default(override, plain, config)


def flatten(node: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """Every key of a nested dict as a dotted path, branches before their leaves."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")


def group_options(group: str) -> list[str]:
    """Names of the config files in a group of the running Hydra."""
    return list(_loader().get_group_options(group, ObjectType.CONFIG))


def nested_options(group: str) -> list[str]:
    """Those of a group and of the groups in it, as paths below it."""
    inner = [sub for sub in _loader().get_group_options(group, ObjectType.GROUP) if sub not in group_options(group)]
    return group_options(group) + [f"{sub}/{option}" for sub in inner for option in nested_options(f"{group}/{sub}")]


def hydra_options() -> list[str]:
    """Hydra's options by which this command finds configs, for the commands that it starts."""
    settings = HydraConfig.get()
    folders = [source.path for source in settings.runtime.config_sources if source.provider == "command-line"]
    search_path = [item for item in settings.overrides.hydra if item.lstrip("+").startswith("hydra.searchpath=")]
    return [*(word for folder in folders for word in ("--config-dir", folder)), *search_path]


def _loader() -> ConfigLoader:
    return GlobalHydra.instance().config_loader()


def _is_group(key: str) -> bool:
    return bool(group_options(key))


def _without_values(command: str, overrides: Sequence[str]) -> dict[Any, Any]:
    """The command's config with the chosen groups and no changed value; empty where even that does not compose."""
    kept = [item for item in overrides if _is_group(re.split("[=@]", item.lstrip("+~"))[0])]
    kept += [item for item in overrides if item.startswith("hydra.searchpath=")]
    for attempt in (kept, []):
        # A hint is worth having, never worth a second error.
        with suppress(HydraException):
            container = OmegaConf.to_container(compose(config_name(command), overrides=attempt))
            assert isinstance(container, dict)
            return container
    return {}


def _explain_missing_option(error: MissingConfigException, overrides: Sequence[str]) -> str:
    path = error.missing_cfg_file or ""
    # experiment=finetune/lora is an option of experiment, as it was written, not one of experiment/finetune.
    written = next((item for item in overrides if item.lstrip("+").replace("=", "/", 1) == path), None)
    group, _, option = written.lstrip("+").partition("=") if written else path.rpartition("/")
    options = sorted({*(error.options or ()), *nested_options(group)}) if group else []
    if not options:
        return one_line(error).partition(" Search path:")[0]
    if group == "hydra/launcher" and option in LAUNCHER_EXTRAS:
        return f"{group}={option}: it is not installed; install it with: pip install 'ldm[{LAUNCHER_EXTRAS[option]}]'"
    file = re.search(r"In '([^']+/[^']+)'", str(error))
    place = f" (asked for in {file[1]}.yaml)" if file else ""
    hint = did_you_mean(option, options) or "."
    return f"{group}={option}: there is no such option{place}{hint} Options: {', '.join(options)}"


def _explain_unknown_key(key: str, command: str, overrides: Sequence[str]) -> str:
    if _is_group(key):
        return f"{key}: `ldm {command}` does not use this group; add it with +{key}=..."
    keys = list(flatten(_without_values(command, overrides)))
    keys += [group for group in _loader().list_groups("") if group not in keys and group != "hydra"]
    choice = next((f"{item} " for item in overrides if item.startswith("experiment=")), "")
    return f"{key}: there is no such setting{_hint(key, keys)} `ldm {command} {choice}--cfg job` shows them all"


def _hint(key: str, keys: list[str]) -> str:
    """The nearest key; a key with the very same last part comes first, so that `lr` finds `optimizer.lr`."""
    ending = [item for item in keys if item.rpartition(".")[2] == key.rpartition(".")[2]]
    near = closest(key, ending, cutoff=0.4) or closest(key, keys) or next(iter(ending), None)
    return f"; did you mean {near}?" if near else ";"


def _refuse_slip(override: Override, plain: dict[Any, Any]) -> None:
    node: Any = plain
    parts = override.key_or_group.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, dict):
            return
        if part not in node:
            near = closest(part, [str(name) for name in node], cutoff=SLIP)
            if near is None:
                return
            right = ".".join([*parts[:depth], near, *parts[depth + 1 :]])
            key = override.key_or_group
            raise UserError(f"+{key}: did you mean {right}? To add {key} all the same, write ++{key}")
        node = node[part]


def _refuse_wrong_type(override: Override, plain: dict[Any, Any], config: DictConfig) -> None:
    """Compares with the default's type: no number or truth value may become text, no list a single value."""
    default = _look_up(plain, override.key_or_group)
    value = _look_up(OmegaConf.to_container(config, resolve=False), override.key_or_group)
    expected = _expected(default, value)
    if expected:
        # Some take either: sizes of a picture, depths of each level.
        written = f"; to set a list all the same, write ++{override.input_line}" if isinstance(value, list) else ""
        raise UserError(f"{override.key_or_group}: got {value!r}, expected {expected}, such as {default!r}{written}")


def _fit_to_default(override: Override, plain: dict[Any, Any], config: DictConfig) -> None:
    """Gives a number the default's type where it means the same, so that one setting makes one run id."""
    key = override.key_or_group
    default, value = _look_up(plain, key), _look_up(OmegaConf.to_container(config, resolve=False), key)
    # 1.0 may mean all, where 1 means one: trainer.limit_val_batches.
    if isinstance(default, int) and isinstance(value, float) and value > 1 and value.is_integer():
        OmegaConf.update(config, key, int(value))
    if isinstance(default, str) and default != MISSING and "${" not in default and is_number(value):
        OmegaConf.update(config, key, str(value))


def _look_up(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _expected(default: Any, value: Any) -> str | None:
    """What the default's type asks for, or None where the value is of that type or the default says nothing."""
    if value is None or (isinstance(value, str) and "${" in value):
        return None
    if isinstance(default, bool) and not isinstance(value, bool):
        return "true or false"
    if isinstance(default, int | float) and not isinstance(default, bool) and not is_number(value):
        return "a number"
    if isinstance(default, list) and not isinstance(value, list):
        return "a list"
    return None


def is_number(value: Any) -> bool:
    """Whether this is an integer or a float; true and false are neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)
