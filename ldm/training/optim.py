"""Learning-rate schedules, in optimizer steps: they do not change with the number of devices."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def constant(optimizer: Optimizer, *, num_warmup_steps: int = 0) -> LambdaLR:
    """Linear warm-up over num_warmup_steps, then the optimizer's own rate."""
    return LambdaLR(optimizer, lambda step: _warmup(step, num_warmup_steps))


def cosine(optimizer: Optimizer, *, num_steps: int, num_warmup_steps: int = 0, final_factor: float = 0.0) -> LambdaLR:
    """Linear warm-up, then half a cosine down to final_factor at num_steps."""
    if num_warmup_steps >= num_steps:
        num_warmup_steps = 0  # a run shortened to a few steps has no room to warm up

    def factor(step: int) -> float:
        progress = min(1.0, max(0, step - num_warmup_steps) / (num_steps - num_warmup_steps))
        fall = final_factor + (1 - final_factor) * (1 + math.cos(math.pi * progress)) / 2
        return fall * _warmup(step, num_warmup_steps)

    return LambdaLR(optimizer, factor)


def _warmup(step: int, num_warmup_steps: int) -> float:
    return min(1.0, (step + 1) / num_warmup_steps) if num_warmup_steps else 1.0
