from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny_models import Losses

from ldm.training import LatentDiffusionModule


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


def test_a_frozen_autoencoder_that_overflows_float16_trains_all_the_same(
    make_latent_diffusion: Callable[..., LatentDiffusionModule],
) -> None:
    """As the published one of SDXL does, of whose NaN every loss would be one."""
    module = make_latent_diffusion()
    for block in (module.autoencoder.encoder.mid.block_1, module.autoencoder.encoder.mid.block_2):
        torch.nn.init.constant_(block.conv2.bias, 6e4)
    batch = {"image": torch.rand(2, 3, 16, 16) * 2 - 1, "caption": ["red", "blue"], "position": torch.arange(2)}
    with torch.autocast("cpu", torch.float16), pytest.warns(UserWarning, match="encoding overflowed float16"):
        assert module.loss(batch, module.trained, 0, 0.0).isfinite().all()
