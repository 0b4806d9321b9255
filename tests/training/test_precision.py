from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny_models import Losses


@pytest.mark.parametrize("module", ["make_latent_diffusion", "make_autoencoder_module"])
def test_bfloat16_training_follows_that_in_single_precision_and_keeps_weights_in_it(
    module: str, make_data: Callable[..., Any], make_trainer: Callable[..., pl.Trainer], request: Any
) -> None:
    """The same five steps; losses within three percent."""
    found = {}
    for precision in ("32", "bf16-mixed"):
        model, losses = request.getfixturevalue(module)(), Losses()
        make_trainer(max_steps=5, precision=precision, callbacks=[losses]).fit(model, make_data())
        found[precision] = [row["train/loss"] for row in losses.rows]
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert found["bf16-mixed"] == pytest.approx(found["32"], rel=0.03)
    assert found["bf16-mixed"] != found["32"]
