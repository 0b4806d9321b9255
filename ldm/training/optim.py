"""Learning-rate schedules, in optimizer steps: they do not change with the number of devices."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def constant(optimizer: Optimizer, *, num_warmup_steps: int = 0) -> LambdaLR:
    """Linear warm-up over num_warmup_steps, then the optimizer's own rate."""
    return LambdaLR(optimizer, lambda step: _warmup(step, num_warmup_steps))


def cosine(optimizer: Optimizer, *, num_steps: int, num_warmup_steps: int = 0, final_factor: float = 0.0) -> LambdaLR:
    """Linear warm-up, then half a cosine down to final_factor at num_steps.

    Raises:
        ValueError: there is no such end.
    """
    _check_end(num_steps)
    if num_warmup_steps >= num_steps:
        num_warmup_steps = 0  # a run shortened to a few steps has no room to warm up

    def factor(step: int) -> float:
        progress = _progress(step, num_warmup_steps, num_steps)
        fall = final_factor + (1 - final_factor) * (1 + math.cos(math.pi * progress)) / 2
        return fall * _warmup(step, num_warmup_steps)

    return LambdaLR(optimizer, factor)


def linear_steps(
    optimizer: Optimizer,
    *,
    num_steps: int,
    num_warmup_steps: int = 0,
    start_factor: float = 0.0,
    peak_factor: float = 1.0,
    final_factor: float = 1.0,
) -> LambdaLR:
    """From start_factor to peak_factor over the warm-up, then on a line to final_factor at num_steps.

    With final_factor = peak_factor that is a warm-up alone: `LambdaLinearScheduler` of latent diffusion's configs.

    Raises:
        ValueError: there is no such end, which only a warm-up alone can do without.
    """
    if final_factor != peak_factor:
        _check_end(num_steps)

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return start_factor + (peak_factor - start_factor) * step / num_warmup_steps
        return peak_factor + (final_factor - peak_factor) * _progress(step, num_warmup_steps, num_steps)

    return LambdaLR(optimizer, factor)


def cosine_steps(
    optimizer: Optimizer,
    *,
    num_steps: int,
    num_warmup_steps: int = 0,
    start_factor: float = 0.0,
    peak_factor: float = 1.0,
    final_factor: float = 0.0,
) -> LambdaLR:
    """As `linear_steps`, with half a cosine after the warm-up: `LambdaWarmUpCosineScheduler` of latent diffusion."""
    if final_factor != peak_factor:
        _check_end(num_steps)

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return start_factor + (peak_factor - start_factor) * step / num_warmup_steps
        fall = (1 + math.cos(math.pi * _progress(step, num_warmup_steps, num_steps))) / 2
        return final_factor + (peak_factor - final_factor) * fall

    return LambdaLR(optimizer, factor)


def _check_end(num_steps: int) -> None:
    """Raises ValueError for a training without a last step, trainer.max_steps=-1: nothing says when to have fallen."""
    if num_steps < 0:
        raise ValueError(
            f"lr_schedule.num_steps: got {num_steps}, expected the number of steps in which the learning rate falls; "
            "set trainer.max_steps, or choose lr_schedule=constant"
        )


def _progress(step: int, num_warmup_steps: int, num_steps: int) -> float:
    """Share of the steps behind the warm-up that are done."""
    return min(1.0, max(0, step - num_warmup_steps) / max(1, num_steps - num_warmup_steps))


def inverse_sqrt(optimizer: Optimizer, *, num_constant_steps: int, num_warmup_steps: int = 0) -> LambdaLR:
    """Linear warm-up, the optimizer's own rate to num_constant_steps, then falling as 1 / sqrt(steps).

    Source: Karras et al. 2024, eq. 67, where num_constant_steps is t_ref.
    """
    if num_constant_steps < 1:
        raise ValueError(f"got lr_schedule.num_constant_steps={num_constant_steps}, expected at least 1")

    def factor(step: int) -> float:
        return max(step / num_constant_steps, 1.0) ** -0.5 * _warmup(step, num_warmup_steps)

    return LambdaLR(optimizer, factor)


def _warmup(step: int, num_warmup_steps: int) -> float:
    return min(1.0, (step + 1) / num_warmup_steps) if num_warmup_steps else 1.0
