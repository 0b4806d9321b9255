"""Clipping of gradients in half precision with fused optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import FSDPStrategy
from torch.optim import Optimizer


class Clipped(pl.LightningModule):
    """A module whose gradients are clipped whatever precision and optimizer are.

    Lightning refuses to in half precision with fused optimizers, since these take the scale of the loss off in their
    step, which is after clipping: but only float16 has a scale, and there the optimizer is built without.
    """

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips bfloat16 training here, and leaves the rest to Lightning."""
        # FSDP's ranks each hold a part of every gradient: Lightning says so and refuses.
        is_spread = isinstance(self.trainer.strategy, FSDPStrategy)
        if not gradient_clip_val or self.trainer.precision != "bf16-mixed" or is_spread:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def clippable(self, make_optimizer: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
        """What makes an optimizer, without `fused` where that would keep gradients from being clipped."""
        options: dict[str, Any] = getattr(make_optimizer, "keywords", {})
        if not options.get("fused") or self.trainer.precision != "16-mixed" or not self.trainer.gradient_clip_val:
            return make_optimizer
        return lambda parameters: make_optimizer(parameters, fused=False)
