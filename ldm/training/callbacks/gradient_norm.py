"""The size of the gradient, before clipping."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from ldm.training.sharding import local, spreads_parameters


class GradientNorm(pl.Callback):
    """Logs `train/gradient_norm`, the Euclidean norm over all parameters, on the steps that are logged.

    Taken before clipping and after unscaling. A module with several optimizers gets one number each
    (`train/gradient_norm_0`, ...). Nothing waits for the device, and other steps compute nothing.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Computes and logs the norm of this optimizer's gradients."""
        every_n_steps = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every_n_steps:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        norm = global_norm(gradients)
        if spreads_parameters(trainer.strategy):
            # Each rank holds a part of every gradient.
            norm = trainer.strategy.reduce(norm.square(), reduce_op="sum").sqrt()
        pl_module.log(f"train/{_name(trainer, optimizer)}", norm)


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all entries that this rank holds, a float32 scalar on their device."""
    norms = torch._foreach_norm([local(gradient) for gradient in gradients])
    return torch.stack([norm.float() for norm in norms]).norm()


def _name(trainer: pl.Trainer, optimizer: Optimizer) -> str:
    if len(trainer.optimizers) == 1:
        return "gradient_norm"
    # Lightning hands over its wrapper in manual optimisation, the optimizer itself otherwise.
    inner = getattr(optimizer, "_optimizer", optimizer)
    return f"gradient_norm_{next(i for i, other in enumerate(trainer.optimizers) if other is inner)}"
