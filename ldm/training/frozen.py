"""Frozen parts stay out of checkpoints: a checkpoint holds what was trained, and loading stays strict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """Evaluation mode, no gradients; marked, so that checkpoints leave it out."""
    module.eval().requires_grad_(False)
    module.is_frozen = True  # type: ignore[assignment]
    return module


def frozen_prefixes(module: nn.Module) -> tuple[str, ...]:
    """Names, with a trailing dot, of the submodules that `freeze` marked."""
    return tuple(f"{name}." for name, part in module.named_modules() if name and getattr(part, "is_frozen", False))


def drop_frozen(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the entries of frozen submodules of `module`."""
    prefixes = frozen_prefixes(module)
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def restore_frozen(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the present values of the frozen submodules of `module` put back."""
    prefixes = frozen_prefixes(module)
    present = {name: tensor for name, tensor in module.state_dict().items() if name.startswith(prefixes)}
    return {**state, **present}
