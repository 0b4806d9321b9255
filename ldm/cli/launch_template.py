"""A launcher's template filled in: a text, or a yaml document, in which what asks for a null is left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from ldm.cli.errors import user_mistakes

# A mapping with this key goes where the setting is null.
CONDITION = "_if_"
_ASKED = re.compile(r"(?<!\\)\$\{([\w.]+)\}")


def render(job: DictConfig) -> str:
    """The file's text, from `template.text` or `template.document`.

    A line of the text that asks for a setting that is null is left out, as are values, mappings and items of the
    document; so is a mapping whose `_if_` is null.

    Args:
        job: the launch's settings, unresolved; `template` among them.

    Raises:
        UserError: a setting without which there is no file has no value.
    """
    OmegaConf.register_new_resolver("literal", _python, replace=True)
    with user_mistakes():
        if "text" in job.template:
            return str(literal(job.template._get_node("text")._value(), job))
        return yaml.dump(literal(job.template.document, job), Dumper=_Blocks, sort_keys=False, width=120)


def literal(node: Any, job: DictConfig) -> Any:
    """A node of a template with everything resolved, without what asks for a null; None where nothing is left."""
    plain = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
    if isinstance(plain, Mapping):
        if CONDITION in plain and literal(plain[CONDITION], job) is None:
            return None
        found = {key: literal(value, job) for key, value in plain.items() if key != CONDITION}
        return {key: value for key, value in found.items() if value is not None} or None
    if isinstance(plain, list):
        return [value for value in (literal(item, job) for item in plain) if value is not None] or None
    return _text(plain, job) if isinstance(plain, str) else plain


def _text(text: str, job: DictConfig) -> Any:
    kept = [line for line in text.splitlines(keepends=True) if not _asks_for_null(line, job)]
    if not kept:
        return None
    value = OmegaConf.select(OmegaConf.merge(job, {"_text_": "".join(kept)}), "_text_", throw_on_missing=True)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _asks_for_null(line: str, job: DictConfig) -> bool:
    # A key that does not exist is no null: resolving it says so.
    return any(OmegaConf.select(job, key, default="", throw_on_missing=True) is None for key in _ASKED.findall(line))


def _python(key: str, *, _root_: DictConfig) -> str:
    """A setting as Python reads it."""
    value = _root_[key]
    return repr(OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value)


class _Blocks(yaml.SafeDumper):
    """Writes a text of several lines as one, in a block."""


def _represent(dumper: _Blocks, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Blocks.add_representer(str, _represent)
