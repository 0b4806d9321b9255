"""Training that runs out of memory, told from other failures."""

from __future__ import annotations

import gc
import re

import torch

# What is no `torch.OutOfMemoryError`: allocations on the CPU, and libraries that ask the device themselves.
_SAID = re.compile(r"can't allocate memory|not enough memory|out of memory|_ALLOC_FAILED", re.IGNORECASE)


class OutOfMemory(Exception):
    """Training ran out of memory; says where, in one line."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no more memory, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None


def release() -> None:
    """Gives what nothing refers to any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
