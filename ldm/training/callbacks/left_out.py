"""Makes an optimizer's step change nothing where a tensor on the device says so, in every precision."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ldm.training.sharding import local


def leave_out(optimizer: Optimizer, rejected: Tensor, *, scaler: GradScaler | None) -> None:
    """Makes the step under way change nothing where `rejected`, a boolean scalar, holds; to be called before it.

    Optimizers that take part in loss scaling (PyTorch's fused ones) skip their step on the device. With others the
    host waits for the decision and drops the gradients.
    """
    optimizer = bare(optimizer)
    if not _takes_part_in_scaling(optimizer):
        if rejected.item():
            optimizer.zero_grad(set_to_none=True)
    elif scaler is None:
        optimizer.found_inf = rejected.float()  # type: ignore[attr-defined]
    else:
        # The scaler sets `found_inf` itself, by what it finds among the gradients.
        for gradient in _gradients(optimizer)[:1]:
            gradient.masked_fill_(rejected, torch.inf)


def take_back(trainer: pl.Trainer) -> None:
    """Leaves optimizers as they were before any `leave_out`."""
    for optimizer in trainer.optimizers:
        vars(bare(optimizer)).pop("found_inf", None)


def unscaled_norm(optimizer: Optimizer, *, like: Tensor, scaler: GradScaler | None) -> Tensor:
    """Norm of an optimizer's gradients before clipping, a float32 scalar; 0 where it has none, of the device of `like`.

    With loss scaling, gradients of an optimizer that takes part in it are still scaled.
    """
    gradients = _gradients(bare(optimizer))
    if not gradients:
        return torch.zeros_like(like)
    norm = global_norm(gradients)
    if scaler is not None and _takes_part_in_scaling(bare(optimizer)):
        return norm / current_scale(scaler)
    return norm


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all entries that this rank holds, a float32 scalar on their device."""
    norms = torch._foreach_norm([local(gradient) for gradient in gradients])
    return torch.stack([norm.float() for norm in norms]).norm()


def loss_scaler(trainer: pl.Trainer) -> GradScaler | None:
    """What scales the loss in float16 training, else None."""
    scaler: GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    return scaler


def current_scale(scaler: GradScaler) -> Tensor:
    """The factor on the loss, a scalar on the device; `get_scale` would wait for it."""
    scale = scaler._get_scale_async()
    assert scale is not None, "a backward pass made it"
    return scale


def bare(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself: Lightning hands over its wrapper in manual optimisation."""
    inner: Optimizer = getattr(optimizer, "_optimizer", optimizer)
    return inner


def _takes_part_in_scaling(optimizer: Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
