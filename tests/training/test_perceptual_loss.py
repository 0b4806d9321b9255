"""The perceptual part of the autoencoder's loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.data import ShardDataModule
from ldm.metrics import LPIPS
from ldm.training import AutoencoderModule

MakeModule = Callable[..., AutoencoderModule]


class MeanColour(nn.Module):
    """A distance that sees an image's mean colour alone, through a weight that must stay as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        return self.weight * (images.mean((2, 3)) - others.mean((2, 3))).square().sum(1)


def batch_of(n: int = 4, side: int = 16) -> dict[str, Any]:
    images = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"image": images, "caption": ["x"] * n, "index": torch.arange(n), "position": torch.arange(n) + 9}


def test_the_distance_counts_once_for_every_value_of_an_image(make_autoencoder_module: MakeModule) -> None:
    """As published: added to each value's absolute error, before the sum over an image."""
    batch, perceptual = batch_of(), MeanColour()
    plain = make_autoencoder_module()
    module = make_autoencoder_module(perceptual=perceptual, perceptual_weight=0.5)
    module.load_state_dict(plain.state_dict(), strict=False)
    reconstructions, _ = module.reconstruct_sampled(batch["image"], batch["position"])
    distance = perceptual(batch["image"], reconstructions).mean()
    assert distance > 1e-3
    expected = plain.loss(batch) + 0.5 * 3 * 16 * 16 * distance
    assert_close(module.loss(batch), expected, rtol=1e-5, atol=0)


def test_it_is_neither_trained_nor_saved(
    make_autoencoder_module: MakeModule,
    make_data: Callable[..., ShardDataModule],
    make_trainer: Callable[..., pl.Trainer],
    tmp_path: Path,
) -> None:
    module, trainer = make_autoencoder_module(perceptual=MeanColour()), make_trainer(max_steps=2)
    trainer.fit(module, make_data())
    assert module.perceptual is not None and not module.perceptual.training
    assert module.perceptual.weight.item() == 2
    trainer.save_checkpoint(tmp_path / "step.ckpt")
    saved = torch.load(tmp_path / "step.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in saved if name.startswith("perceptual")]
    resumed, trainer = make_autoencoder_module(perceptual=MeanColour()), make_trainer(max_steps=3)
    trainer.fit(resumed, make_data(), ckpt_path=tmp_path / "step.ckpt", weights_only=True)
    assert resumed.num_steps == 3


def test_lpips_teaches_the_autoencoder(make_autoencoder_module: MakeModule, tmp_path: Path) -> None:
    from torchvision.models import alexnet

    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
    perceptual = LPIPS(tmp_path / "alexnet.pth", backbone="alex")
    module = make_autoencoder_module(perceptual=perceptual)
    batch = batch_of(2, side=64)
    reconstructions, _ = module.reconstruct_sampled(batch["image"], batch["position"])
    perceptual(batch["image"], reconstructions).mean().backward()
    gradients = [p.grad for p in module.autoencoder.decoder.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert max(gradient.abs().max().item() for gradient in gradients if gradient is not None) > 0
    assert module.loss(batch).item() == pytest.approx(
        make_loss_without(module, batch) + 3 * 64 * 64 * perceptual(batch["image"], reconstructions).mean().item(),
        rel=1e-4,
    )


def make_loss_without(module: AutoencoderModule, batch: dict[str, Any]) -> float:
    perceptual, module.perceptual = module.perceptual, None
    value = module.loss(batch).item()
    module.perceptual = perceptual
    return value
