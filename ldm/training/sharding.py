"""Parameters spread over devices, a network's blocks one by one (FSDP2), and parameters made whole again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.diffusion import Conditioning


def spreads_parameters(strategy: Any) -> bool:
    """Whether each rank holds a part of every gradient."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is spread, without a copy; any other tensor as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def check_steps_spread(optimizer: Optimizer) -> None:
    """Raises ValueError for an optimizer whose own kernels take no tensor that FSDP2 spreads."""
    is_spread = any(hasattr(one, "to_local") for group in optimizer.param_groups for one in group["params"])
    if is_spread and type(optimizer).__module__.startswith("bitsandbytes"):
        raise ValueError(
            f"got optimizer {type(optimizer).__name__} with parameters that FSDP2 spreads over devices, which it "
            "cannot step; choose optimizer=adamw, or strategy=ddp"
        )


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks that a network applies one after another: members of its outermost lists of modules."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks_of(child)


def shard(network: nn.Module, *, mesh: Any) -> None:
    """Spreads a network's parameters over the ranks of `mesh`; each block's are gathered while it computes."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in [*blocks_of(network), network]:
        # Left to itself, the outermost would stay whole until a backward pass, which an average never has.
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    if hasattr(network, "log_variance"):
        register_fsdp_forward_method(network, "log_variance")


def shard_whole(module: nn.Module, *, mesh: Any, methods: tuple[str, ...]) -> None:
    """Spreads a small module's parameters; `methods` besides `forward` are what else computes with them."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    _let_conditions_be_trees()
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for method in methods:
        register_fsdp_forward_method(module, method)


@cache
def _let_conditions_be_trees() -> None:
    """Lets torch below 2.15 find tensors in a `Conditioning`: a backward pass gathers what those that it finds need."""
    torch.export.register_dataclass(Conditioning)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict, gathered where its parameters are spread; then to be called on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return dict(module.state_dict())
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(module, options=options))
