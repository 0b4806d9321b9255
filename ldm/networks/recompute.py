"""Gradient checkpointing of single blocks."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def apply_block(block: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """The block's output for its inputs; with recompute it is computed again in the backward pass, to save memory."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
