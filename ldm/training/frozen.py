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


def leave_out_untrained(module: nn.Module) -> None:
    """Marks every single parameter without a gradient, so that checkpoints leave it out too."""
    for parameter in module.parameters():
        parameter.is_frozen = not parameter.requires_grad  # type: ignore[attr-defined]


def drop_frozen(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the entries of what is frozen in `module`."""
    prefixes, single = frozen_prefixes(module), _frozen_parameters(module)
    return {name: value for name, value in state.items() if name not in single and not name.startswith(prefixes)}


def restore_frozen(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the present values of what is frozen in `module` put back."""
    prefixes, single = frozen_prefixes(module), _frozen_parameters(module)
    present = {
        name: value for name, value in module.state_dict().items() if name in single or name.startswith(prefixes)
    }
    return {**state, **present}


def _frozen_parameters(module: nn.Module) -> set[str]:
    """Names in the state dict of the parameters that `leave_out_untrained` marked."""
    if not any(getattr(parameter, "is_frozen", False) for parameter in module.parameters()):
        return set()
    # Through the state dict: a module may give its tensors other names than its parameters have.
    return {name for name, value in module.state_dict(keep_vars=True).items() if getattr(value, "is_frozen", False)}
