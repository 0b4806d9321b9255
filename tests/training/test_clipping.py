"""Gradients are clipped in every precision, by every algorithm, whatever the optimizer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from test_noisy_classifier_module import batch
from test_noisy_classifier_module import module as noisy_classifier
from tiny_models import latent_diffusion_module
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

LIMIT = 1e-3


class Gradients(pl.Callback):
    """Keeps the gradients that the last step was made of."""

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        found = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        if found:
            self.found = torch.cat([gradient.detach().flatten().clone() for gradient in found])


def taken(module: pl.LightningModule, data: Any, make_trainer: Callable[..., pl.Trainer], **options: Any) -> Tensor:
    """The clipped gradients of the first of two steps."""
    gradients = Gradients()
    if options.get("precision") == "16-mixed":
        del options["precision"]
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        options["plugins"] = [pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    trainer = make_trainer(max_steps=2, limit_val_batches=0, gradient_clip_val=LIMIT, callbacks=[gradients], **options)
    trainer.fit(module, data)
    return gradients.found


def classifier(**options: Any) -> pl.LightningModule:
    made = noisy_classifier()
    made.make_optimizer = options["optimizer"]
    return made


MODULES = {"latent diffusion": latent_diffusion_module, "noisy classifier": classifier}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_of_fused_optimizers_are_clipped(
    name: str, precision: str, algorithm: str, make_data: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    data = make_data() if name == "latent diffusion" else DataLoader([batch(0), batch(16)], batch_size=None)
    module = MODULES[name](optimizer=partial(torch.optim.AdamW, lr=1e-4, fused=True))
    found = taken(module, data, make_trainer, precision=precision, gradient_clip_algorithm=algorithm)
    size = found.norm() if algorithm == "norm" else found.abs().max()
    assert_close(size, torch.tensor(LIMIT), rtol=1e-3, atol=0)


def test_an_optimizer_that_knows_no_fused_is_built_for_clipping_in_float16(
    make_data: Callable[..., Any], make_trainer: Callable[..., pl.Trainer]
) -> None:
    class Plain(torch.optim.SGD):
        def __init__(self, parameters: list[nn.Parameter], *, lr: float) -> None:
            super().__init__(parameters, lr=lr)

    module = latent_diffusion_module(optimizer=partial(Plain, lr=1e-4))
    assert_close(
        taken(module, make_data(), make_trainer, precision="16-mixed").norm(), torch.tensor(LIMIT), rtol=1e-3, atol=0
    )
