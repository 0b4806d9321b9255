"""What a config that comes with a checkpoint may call: a downloaded file must not run what its author likes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

# Packages that define classes which only compute. Functions are not among them but for those below: some of ours write
# files. Of torchmetrics those that take no network by its name: CLIPScore runs the code of some.
PACKAGES = (
    *("ldm.autoencoders", "ldm.conditioners", "ldm.data", "ldm.diffusion", "ldm.generation", "ldm.metrics"),
    *("ldm.networks", "ldm.samplers", "ldm.training", "torch.nn", "torch.optim", "bitsandbytes.optim"),
    *("torchmetrics.aggregation", "torchmetrics.classification", "torchmetrics.regression"),
)
FUNCTIONS = (
    "ldm.data.digits.evaluation_prompts",
    "ldm.training.finetune.pretrained",
    "ldm.training.optim.constant",
    "ldm.training.optim.cosine",
    "ldm.training.optim.cosine_steps",
    "ldm.training.optim.inverse_sqrt",
    "ldm.training.optim.linear_steps",
)
# `${oc.env:...}` reads this machine's variables and `${oc.create:...}` makes settings that nobody has looked at.
_RESOLVER = re.compile(r"\$\{(?!oc\.select:)[^{}]*:")


def check_targets(config: Any, *, trust: Sequence[str] = ()) -> None:
    """Refuses a config, as plain containers, with a `_target_` that is not known to be harmless, or with a resolver.

    Args:
        trust: packages or full names that may be called besides.

    Raises:
        ValueError: it calls something else.
    """
    for target in targets(config):
        if not (is_harmless(target) or any(f"{target}.".startswith(f"{name}.") for name in trust)):
            package = target.partition(".")[0]
            raise ValueError(
                f"got a config that calls {target}, expected parts of ldm or torch alone; if you know who wrote it, "
                f"set trust=[{package}]"
            )
    for text in _texts(config):
        if _RESOLVER.search(text):
            raise ValueError(f"got a config with {text}, expected values alone; write what it stands for in its place")


def targets(node: Any) -> Iterator[str]:
    """Every `_target_` in nested dicts and lists."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from targets(value)


def is_harmless(target: str) -> bool:
    """Whether this is a class that a known package defines, the `load` of one of ours, or a known function."""
    if target in FUNCTIONS:
        return True
    *place, name = target.split(".")
    if name == "load" and place[:1] == ["ldm"] and place[-1][:1].isupper():
        *place, name = place
    module = ".".join(place)
    return name[:1].isupper() and _is_known(module) and _is_defined_by_known(module, name)


def _is_known(module: str) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in PACKAGES)


def _is_defined_by_known(module: str, name: str) -> bool:
    """Whether a name means a class of a known package's own: `ldm.training.trial.subprocess.Popen` is none."""
    try:
        found = getattr(import_module(module), name, None)
    except ModuleNotFoundError as error:
        # Of a package that is not installed nothing is called; building says which extra installs it.
        return error.name == module.partition(".")[0]
    return found is None or (isinstance(found, type) and _is_known(found.__module__))


def _texts(node: Any) -> Iterator[str]:
    """Every string in nested dicts and lists."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list | tuple):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _texts(value)
