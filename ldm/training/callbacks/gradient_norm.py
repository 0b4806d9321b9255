"""The size of the gradient, before clipping."""

from __future__ import annotations

import pytorch_lightning as pl
from torch.optim import Optimizer

from ldm.training.callbacks.left_out import bare, loss_scaler, unscaled_norm
from ldm.training.sharding import spreads_parameters


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
        # Fused optimizers take the float16 scale off in their step, which is still to come.
        norm = unscaled_norm(optimizer, like=gradients[0], scaler=loss_scaler(trainer))
        if spreads_parameters(trainer.strategy):
            # Each rank holds a part of every gradient.
            norm = trainer.strategy.reduce(norm.square(), reduce_op="sum").sqrt()
        pl_module.log(f"train/{_name(trainer, optimizer)}", norm)


def _name(trainer: pl.Trainer, optimizer: Optimizer) -> str:
    if len(trainer.optimizers) == 1:
        return "gradient_norm"
    inner = bare(optimizer)
    return f"gradient_norm_{next(i for i, other in enumerate(trainer.optimizers) if other is inner)}"
