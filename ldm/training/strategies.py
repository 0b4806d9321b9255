"""Distributed strategies that need more than settings."""

from __future__ import annotations

from datetime import timedelta
from importlib.util import find_spec
from typing import Literal

from torch import nn

from ldm.conditioners import ClassLabel, TextTransformer
from ldm.networks import UNet
from ldm.training.checkpoint_sharded import SealedDeepSpeed, SealedFSDP, SealedFSDP2

# What `fsdp` wraps whole.
WRAPPED = (UNet, TextTransformer, ClassLabel)


def fsdp(
    *,
    sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP"] = "FULL_SHARD",
    state_dict_type: Literal["full", "sharded"] = "full",
    timeout_minutes: float = 30,
) -> SealedFSDP:
    """Fully sharded data parallelism, on GPUs.

    Each trained module is wrapped whole, and its moving average likewise: only then do both have the same shards on a
    rank, which the average's update needs.

    Args:
        state_dict_type: "full" gathers one file on rank 0, readable by any number of devices.
    """
    return SealedFSDP(
        auto_wrap_policy=set(WRAPPED),
        sharding_strategy=sharding_strategy,
        state_dict_type=state_dict_type,
        timeout=timedelta(minutes=timeout_minutes),
    )


def check_wrapped(trained: nn.Module) -> None:
    """Raises ValueError for a module of which `fsdp` would spread trained parameters otherwise than their average."""
    inside = {id(p) for part in trained.modules() if isinstance(part, WRAPPED) for p in part.parameters()}
    outside = [name for name, p in trained.named_parameters() if p.requires_grad and id(p) not in inside]
    if outside:
        raise ValueError(
            f"got strategy=fsdp with {len(outside)} trained parameters ({outside[0]}, ...) outside of "
            f"{', '.join(kind.__name__ for kind in WRAPPED)}, which are all that it knows to wrap; set strategy=fsdp2"
        )


def fsdp2(*, state_dict_type: Literal["full", "sharded"] = "full", timeout_minutes: float = 30) -> SealedFSDP2:
    """Fully sharded data parallelism of the second kind (PyTorch's `fully_shard`), on GPUs or CPUs.

    The module spreads its own parts: see `LatentDiffusionModule.configure_model`.

    Args:
        state_dict_type: "full" gathers one file on rank 0, readable by any number of devices and any strategy.

    Raises:
        ValueError: another state_dict_type.
    """
    if state_dict_type not in ("full", "sharded"):
        raise ValueError(f"strategy.state_dict_type: got {state_dict_type!r}, expected 'full' or 'sharded'")
    return SealedFSDP2(
        save_distributed_checkpoint=state_dict_type == "sharded", timeout=timedelta(minutes=timeout_minutes)
    )


def deepspeed(*, stage: int = 2, offload_optimizer: bool = False, timeout_minutes: float = 30) -> SealedDeepSpeed:
    """DeepSpeed's ZeRO, on GPUs: optimizer state, and from stage 2 gradients too, spread over the processes.

    Args:
        stage: 1 or 2. The third spreads parameters, which the moving average could not follow: `fsdp2` does that.
        offload_optimizer: keep the optimizer's state in the CPU's memory.

    Raises:
        ValueError: another stage.
        ModuleNotFoundError: deepspeed is missing.

    Source: Rajbhandari et al. 2020.
    """
    if stage not in (1, 2):
        raise ValueError(f"strategy.stage: got {stage}, expected 1 or 2; set strategy=fsdp2 to spread parameters too")
    if find_spec("deepspeed") is None:
        raise ModuleNotFoundError(
            "the package deepspeed is not installed; install it with: pip install 'ldm[deepspeed]'"
        )
    return SealedDeepSpeed(stage=stage, offload_optimizer=offload_optimizer, timeout=timedelta(minutes=timeout_minutes))
