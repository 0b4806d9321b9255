"""What a config that comes with a checkpoint may call: a downloaded file must not run what its author likes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

# Packages whose classes only compute. Functions are not among them but for those below: some of ours write files.
PACKAGES = (
    *("ldm.autoencoders", "ldm.conditioners", "ldm.data", "ldm.diffusion", "ldm.generation", "ldm.metrics"),
    *("ldm.networks", "ldm.samplers", "ldm.training", "torch.nn", "torch.optim", "torchmetrics", "bitsandbytes.optim"),
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


def check_targets(config: Any, *, trust: Sequence[str] = ()) -> None:
    """Refuses a config, as plain containers, with a `_target_` that is not known to be harmless.

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
    """Whether this is a class of a known package, the `load` of one, or a known function."""
    *place, name = target.split(".")
    if name == "load" and place and place[-1][:1].isupper():
        *place, name = place
    is_class = name[:1].isupper() and all(part.isidentifier() and not part[:1].isupper() for part in place)
    inside = any(f"{target}.".startswith(f"{package}.") for package in PACKAGES)
    return target in FUNCTIONS or (is_class and inside)
