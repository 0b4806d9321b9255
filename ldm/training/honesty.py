"""Whether processes that train together hold the same numbers and share their work out: questions, not remedies."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

T = TypeVar("T", bound=Hashable)
# Integers of as many bytes as a number has, to see its bits.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Entries that are hashed at once, so that hashing a large tensor takes little memory.
_CHUNK = 1 << 22
# Of names in a message.
_SHOWN = 5


class RanksDisagree(Exception):
    """Processes that should be equal are not; raised by all of them, with one line for all."""


def bits(tensor: Tensor) -> Tensor:
    """A hash of a tensor's bits and their places, an int64 scalar on its device; waits for nothing."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    flat = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].long()
        # Odd factors are invertible modulo 2^64: no single changed number can keep the sum.
        total += (part * (2 * torch.arange(start, start + len(part), device=flat.device) + 1)).sum()
    return total


def differing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors whose bits are not the same on all ranks; to be called on each, with the same names."""
    if not tensors:
        return []
    each = [bits(tensor) for tensor in tensors.values()]
    # An offloaded average lies in the host's memory, which NCCL does not know.
    device = next((one.device for one in each if one.device.type != "cpu"), each[0].device)
    hashes = torch.stack([one.to(device) for one in each])
    # Equal extremes are equal everywhere; NCCL and gloo both know these two.
    low, high = hashes.clone(), hashes.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    unequal = (low != high).tolist()
    return [name for name, is_unequal in zip(tensors, unequal, strict=True) if is_unequal]


def state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, less what each rank has of its own: a batch norm's running statistics."""
    own = {
        f"{name}.{buffer}" if name else buffer
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and not isinstance(part, SyncBatchNorm)
        for buffer, _ in part.named_buffers(recurse=False)
    }
    buffers = {name: buffer for name, buffer in module.named_buffers() if name not in own}
    return {**dict(module.named_parameters()), **buffers}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients by their parameters' names."""
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def repeated(places: Iterable[T]) -> list[T]:
    """Those that occur more than once."""
    seen: set[T] = set()
    again = []
    for place in places:
        if place in seen:
            again.append(place)
        seen.add(place)
    return again


def gathered(numbers: Tensor) -> Tensor:
    """The numbers of all ranks (W, ...), each rank's of the same shape."""
    rows = [torch.empty_like(numbers) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, numbers.contiguous())
    return torch.stack(rows)


def listed(names: Sequence[object]) -> str:
    """The first few names, and how many there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more
