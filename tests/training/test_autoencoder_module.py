import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.autoencoders import IdentityAutoencoder, KLAutoencoder
from ldm.data import ShardDataModule
from ldm.data.buckets import Buckets
from ldm.training import AutoencoderModule
from ldm.training.latent_scale import measure_latent_scale
from ldm.training.losses import adaptive_weight, discriminator_hinge_loss, generator_loss
from ldm.training.optim import cosine
from ldm.training.randomness import normal

MakeModule = Callable[..., AutoencoderModule]
MakeData = Callable[..., ShardDataModule]
MakeTrainer = Callable[..., pl.Trainer]


def batch_of(n: int = 4) -> dict[str, Any]:
    images = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"image": images, "caption": ["x"] * n, "index": torch.arange(n), "position": torch.arange(n) + 9}


def gradients(module: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True))


@pytest.fixture
def trained(make_autoencoder_module: MakeModule, make_data: MakeData, make_trainer: MakeTrainer) -> AutoencoderModule:
    """After five steps, of which the last three have the adversary."""
    module = make_autoencoder_module()
    make_trainer(max_steps=5).fit(module, make_data())
    return module


def test_one_backward_pass_gives_each_network_the_gradient_of_its_own_loss(make_autoencoder_module: MakeModule) -> None:
    module, batch = make_autoencoder_module(adversarial_start=0), batch_of()
    module.loss(batch).backward()
    images = batch["image"]
    reconstructions, kl = module.reconstruct_sampled(images, batch["position"])
    error = (images - reconstructions).abs().sum((1, 2, 3)).mean()
    adversary = generator_loss(module.discriminator(reconstructions))
    weight = 0.5 * adaptive_weight(error, adversary, module.autoencoder.last_layer)
    generator = gradients(module.autoencoder, error + 1e-3 * kl + weight * adversary)
    judged = discriminator_hinge_loss(module.discriminator(images), module.discriminator(reconstructions.detach()))
    for network, expected in [
        (module.autoencoder, generator),
        (module.discriminator, gradients(module.discriminator, judged)),
    ]:
        found = [parameter.grad for parameter in network.parameters()]
        assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert max(gradient.abs().max() for gradient in expected) > 1e-3


def test_the_adversary_balances_the_reconstruction_at_the_last_layer(make_autoencoder_module: MakeModule) -> None:
    """With weight 1 both losses pull equally hard at the decoder's last layer (Esser et al. 2021, eq. 7)."""
    module, batch = make_autoencoder_module(adversarial_start=0), batch_of()
    images, layer = batch["image"], module.autoencoder.last_layer
    reconstructions, _ = module.reconstruct_sampled(images, batch["position"])
    error = (images - reconstructions).abs().sum((1, 2, 3)).mean()
    adversary = generator_loss(module.discriminator(reconstructions))
    weighted = adaptive_weight(error, adversary, layer) * adversary
    norms = [torch.autograd.grad(loss, layer, retain_graph=True)[0].norm() for loss in (error, weighted)]
    assert_close(norms[0], norms[1], rtol=1e-2, atol=0)


def test_steps_are_batches_although_there_are_two_optimizers(
    make_autoencoder_module: MakeModule, make_data: MakeData, make_trainer: MakeTrainer, losses: Any
) -> None:
    module, trainer = make_autoencoder_module(), make_trainer(max_steps=5, callbacks=[losses])
    trainer.fit(module, make_data())
    assert (trainer.global_step, module.num_steps, len(losses.rows)) == (5, 5, 5)


def test_the_adversary_starts_at_its_step(
    make_autoencoder_module: MakeModule, make_data: MakeData, make_trainer: MakeTrainer, losses: Any
) -> None:
    class Discriminators(pl.Callback):
        def __init__(self) -> None:
            self.states: list[Tensor] = []

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: AutoencoderModule, *_: Any) -> None:
            self.states.append(torch.cat([p.detach().flatten().clone() for p in pl_module.discriminator.parameters()]))

    module, watch = make_autoencoder_module(adversarial_start=3), Discriminators()
    make_trainer(max_steps=6, callbacks=[losses, watch]).fit(module, make_data())
    assert ["train/discriminator" in row for row in losses.rows] == [False] * 3 + [True] * 3
    # The states before each step: the first change is seen before step 4.
    changed = [not torch.equal(a, b) for a, b in zip(watch.states, watch.states[1:], strict=False)]
    assert changed == [False, False, False, True, True]


@pytest.mark.parametrize("fused", [False, True])
def test_in_float16_both_networks_step_by_the_scale_of_their_one_backward_pass(
    fused: bool, make_autoencoder_module: MakeModule, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    """Also where the scale grows in that step."""
    moved = {}
    for growth in (1.5, 4.0):
        sgd = partial(torch.optim.SGD, lr=1e-3, fused=fused)
        module = make_autoencoder_module(adversarial_start=0, optimizer=sgd, discriminator_optimizer=sgd)
        before = [parameter.detach().clone() for parameter in module.parameters()]
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_factor=growth, growth_interval=1)
        precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
        make_trainer(max_steps=1, limit_val_batches=0, plugins=[precision]).fit(module, make_data())
        moved[growth] = [new.detach() - old for new, old in zip(module.parameters(), before, strict=True)]
        assert scaler.get_scale() == growth
    assert_close(moved[1.5], moved[4.0], rtol=0, atol=0)


def test_each_learning_rate_follows_its_schedule_by_the_steps_of_its_optimizer(
    make_autoencoder_module: MakeModule, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    module = make_autoencoder_module(
        lr_schedule=partial(cosine, num_steps=8),
        discriminator_optimizer=partial(torch.optim.Adam, lr=4e-3),
    )
    make_trainer(max_steps=4).fit(module, make_data())
    # The discriminator has waited for two of the four steps.
    rates = [optimizer.param_groups[0]["lr"] for optimizer in module.optimizers()]
    assert rates == pytest.approx([0.5e-3, 2e-3 * (1 + math.cos(math.pi * 2 / 8))])


def test_the_loss_is_the_sum_of_its_parts(make_autoencoder_module: MakeModule) -> None:
    module, batch = make_autoencoder_module(), batch_of()
    images, autoencoder = batch["image"], module.autoencoder
    moments = autoencoder.encode(images)
    mean, logvar = moments.chunk(2, dim=1)
    latents = (mean + (0.5 * logvar).exp() * normal(7, batch["position"], (4, 8, 8))) * 0.8
    error = (images - autoencoder.decode(latents)).abs().sum((1, 2, 3)).mean()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    assert_close(module.loss(batch), error + 1e-3 * kl, rtol=1e-5, atol=0)


def test_validation_is_the_error_and_the_signal_to_noise_of_the_mean(
    trained: AutoencoderModule, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    data = make_data()
    found = make_trainer().validate(trained, data, verbose=False)[0]
    images = torch.cat([batch["image"] for batch in data.iterate_once("validation", 5)])
    with torch.no_grad():
        autoencoder = trained.autoencoder.eval()
        decoded = autoencoder.decode(autoencoder.to_latents(autoencoder.encode(images), noise=None)).clamp(-1, 1)
    # The peak of images in [-1, 1] is 2.
    psnr = 10 * torch.log10(4 / (images - decoded).square().mean((1, 2, 3))).mean()
    assert found["val/reconstruction"] == pytest.approx((images - decoded).abs().mean().item(), rel=1e-4)
    assert found["val/psnr"] == pytest.approx(psnr.item(), rel=1e-4)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    trained: AutoencoderModule,
    make_autoencoder_module: MakeModule,
    make_data: MakeData,
    make_trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    begun, trainer = make_autoencoder_module(), make_trainer(max_steps=3)
    trainer.fit(begun, make_data())
    trainer.save_checkpoint(tmp_path / "step.ckpt")
    resumed, trainer = make_autoencoder_module(), make_trainer(max_steps=5)
    trainer.fit(resumed, make_data(), ckpt_path=tmp_path / "step.ckpt", weights_only=True)
    assert (resumed.num_steps, trainer.global_step) == (5, 5)
    assert_close(dict(resumed.state_dict()), dict(trained.state_dict()), rtol=0, atol=0)


def test_the_measured_scale_gives_latents_zero_mean_and_unit_variance(
    trained: AutoencoderModule, make_data: MakeData
) -> None:
    data, autoencoder = make_data(), trained.autoencoder
    shift, scale = measure_latent_scale(autoencoder.train(), data)
    autoencoder.set_latent_scale(scale, shift)
    images = torch.cat([batch["image"] for batch in data.iterate_once("train", 7)])
    with torch.no_grad():
        moments = autoencoder.encode(images).repeat(50, 1, 1, 1)
        latents = autoencoder.to_latents(moments, noise=normal(0, torch.arange(len(moments)), (4, 8, 8)))
    assert_close(torch.stack([latents.mean(), latents.var()]), torch.tensor([0.0, 1.0]), rtol=0, atol=5e-3)


class Counting(IdentityAutoencoder):
    """Counts the pictures that it encodes at once."""

    def encode(self, images: Tensor) -> Tensor:
        self.counts.append(len(images))
        return super().encode(images)


@pytest.mark.parametrize(("resolution", "counts"), [(16, [24]), (256, [16, 8]), (384, [7, 7, 7, 3])])
def test_the_scale_is_measured_on_no_more_pixels_at_once_than_fit_wherever_training_did(
    resolution: int, counts: list[int], make_data: MakeData
) -> None:
    autoencoder = Counting()
    autoencoder.counts = []
    measure_latent_scale(autoencoder, make_data(resolution=resolution))
    assert autoencoder.counts == counts


def test_the_finished_autoencoder_rebuilds_itself_with_its_scale(
    trained: AutoencoderModule, make_data: MakeData, tmp_path: Path
) -> None:
    geometry = {"base_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4}
    config = {"autoencoder": {"_target_": "ldm.autoencoders.KLAutoencoder", **geometry}}
    summary = trained.finish(tmp_path, data=make_data(), config=config)
    loaded = KLAutoencoder.load(tmp_path / summary["autoencoder"])
    assert_close(dict(loaded.state_dict()), dict(trained.autoencoder.state_dict()), rtol=0, atol=0)
    assert loaded.latent_scale.item() == pytest.approx(summary["latent_scale"])
    assert loaded.latent_shift.item() == pytest.approx(summary["latent_shift"])
    assert summary["latent_scale"] != pytest.approx(0.8)


def test_one_batch_is_learned_by_heart(make_autoencoder_module: MakeModule) -> None:
    """100 steps of reconstruction alone on four images: less than a quarter of the error is left."""
    module, batch = make_autoencoder_module(adversarial_start=10**9), batch_of()
    optimizer = torch.optim.Adam(module.autoencoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        loss = module.loss(batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4


def test_pictures_that_the_autoencoder_does_not_divide_are_refused_before_the_first_step(
    make_autoencoder_module: MakeModule, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    with pytest.raises(ValueError, match=r"got data\.resolution=15, expected a multiple of 2.*set data\.resolution=16"):
        make_trainer(max_steps=1).fit(make_autoencoder_module(), make_data(resolution=15))
    with pytest.raises(ValueError, match=r"got data\.buckets with 16 x 15, expected multiples of 2"):
        make_trainer(max_steps=1).fit(make_autoencoder_module(), make_data(buckets=Buckets([[16, 16], [16, 15]])))
