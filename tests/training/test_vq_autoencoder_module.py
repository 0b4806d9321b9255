"""Training of a VQ autoencoder, and of diffusion on one."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny_models import autoencoder_module, latent_diffusion_module, tiny_quantized, vq_autoencoder_module
from torch.testing import assert_close

from ldm.autoencoders import Autoencoder, IdentityAutoencoder, KLAutoencoder, VQAutoencoder
from ldm.data import ShardDataModule
from ldm.generation.encode import encode_dataset
from ldm.training import AutoencoderModule
from ldm.training.latent_scale import measure_latent_scale

MakeData = Callable[..., ShardDataModule]
MakeTrainer = Callable[..., pl.Trainer]


def vq_module(**options: Any) -> AutoencoderModule:
    return vq_autoencoder_module(**({"adversarial_start": 10**9} | options))


def batch_of(n: int = 4) -> dict[str, Any]:
    images = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"image": images, "caption": ["x"] * n, "index": torch.arange(n), "position": torch.arange(n) + 9}


def test_the_loss_is_the_mean_error_and_the_weighted_loss_of_the_codebook() -> None:
    module, batch = vq_module(quantization_weight=3.0), batch_of()
    images, autoencoder = batch["image"], module.autoencoder
    moments = autoencoder.encode(images)
    entries = autoencoder.quantize.entries(autoencoder.codes(moments))
    error = (images - autoencoder.decode_quantized(entries)).abs().mean()
    assert_close(module.loss(batch), error + 3 * 1.25 * (moments - entries).square().mean(), rtol=1e-5, atol=0)


def test_gradients_reach_encoder_codebook_and_decoder() -> None:
    module = vq_module()
    module.loss(batch_of()).backward()
    assert [name for name, p in module.autoencoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_one_batch_is_learned_by_heart() -> None:
    """100 steps of reconstruction alone on four pictures of four colours: less than a quarter of the loss is left."""
    module, batch = vq_module(), batch_of()
    batch["image"] = torch.nn.functional.interpolate(batch["image"][:, :, :2, :2], size=16)
    optimizer = torch.optim.Adam(module.autoencoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        loss = module.loss(batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4


@pytest.fixture
def trained(make_data: MakeData, make_trainer: MakeTrainer, losses: Any) -> AutoencoderModule:
    """After five steps, of which the last three have the adversary."""
    module = vq_module(adversarial_start=2)
    make_trainer(max_steps=5, callbacks=[losses]).fit(module, make_data())
    return module


def test_training_logs_the_loss_of_the_codebook_and_the_adversary(trained: AutoencoderModule, losses: Any) -> None:
    assert ["train/discriminator" in row for row in losses.rows] == [False] * 2 + [True] * 3
    assert all(row["train/quantization"] > 0 and "train/kl" not in row for row in losses.rows)


def test_validation_measures_the_use_of_the_codebook_over_all_batches(
    trained: AutoencoderModule, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    data = make_data()
    found = [make_trainer().validate(trained, data, verbose=False)[0] for _ in range(2)]
    images = torch.cat([batch["image"] for batch in data.iterate_once("validation", 5)])
    codes = trained.autoencoder.codes(trained.autoencoder.encode(images))
    shares = codes.flatten().bincount(minlength=32) / codes.numel()
    used = shares[shares > 0]
    assert 1 < len(used) < 32
    assert found[0]["val/codebook_usage"] == pytest.approx(len(used) / 32)
    assert found[0]["val/perplexity"] == pytest.approx(math.exp(-(used * used.log()).sum()), rel=1e-5)
    # Counted anew at each validation.
    assert found[0] == pytest.approx(found[1])


def test_a_kl_autoencoder_has_no_codebook_to_measure(make_data: MakeData, make_trainer: MakeTrainer) -> None:
    found = make_trainer().validate(autoencoder_module(), make_data(), verbose=False)[0]
    assert set(found) == {"val/reconstruction", "val/psnr"}


def test_the_finished_autoencoder_rebuilds_itself_with_its_scale(
    trained: AutoencoderModule, make_data: MakeData, tmp_path: Path
) -> None:
    config = {"autoencoder": {"_target_": "ldm.autoencoders.VQAutoencoder", **trained.autoencoder.arguments}}
    summary = trained.finish(tmp_path, data=make_data(), config=config)
    loaded = Autoencoder.load(tmp_path / summary["autoencoder"])
    assert type(loaded) is VQAutoencoder
    assert_close(dict(loaded.state_dict()), dict(trained.autoencoder.state_dict()), rtol=0, atol=0)
    assert loaded.latent_scale.item() == pytest.approx(summary["latent_scale"])


@pytest.mark.parametrize("kind", [VQAutoencoder, IdentityAutoencoder])
def test_the_measured_scale_gives_latents_zero_mean_and_unit_variance(
    kind: type[Autoencoder], make_data: MakeData
) -> None:
    data, autoencoder = make_data(), tiny_quantized() if kind is VQAutoencoder else IdentityAutoencoder()
    shift, scale = measure_latent_scale(autoencoder, data)
    autoencoder.set_latent_scale(scale, shift)
    images = torch.cat([batch["image"] for batch in data.iterate_once("train", 7)])
    with torch.no_grad():
        latents = autoencoder.to_latents(autoencoder.encode(images), noise=None)
    assert_close(torch.stack([latents.mean(), latents.var()]), torch.tensor([0.0, 1.0]), rtol=0, atol=1e-3)


def test_diffusion_trains_alike_on_images_and_on_moments_of_c_channels() -> None:
    module, batch = latent_diffusion_module(autoencoder=tiny_quantized(latent_scale=0.7)), batch_of()
    batch["caption"] = ["red", "blue", "green", "red"]
    moments = {**batch, "moments": module.autoencoder.encode(batch["image"])}
    del moments["image"]
    assert moments["moments"].shape == (4, 4, 8, 8)
    losses = [module.loss(b, module.trained, 0, 0.1) for b in (batch, moments)]
    assert_close(losses[0], losses[1], rtol=0, atol=0)


def test_diffusion_trains_on_latent_shards_and_samples(
    make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    autoencoder, folder = tiny_quantized(), tmp_path / "latents"
    encode_dataset(autoencoder, make_data(), folder)
    module = latent_diffusion_module(autoencoder=autoencoder)
    before = [p.detach().clone() for p in module.trained.denoiser.parameters()]
    data = ShardDataModule(folder / "train", folder / "validation", batch_size=6)

    make_trainer(max_steps=2).fit(module, data)
    (picture,) = module.sample(["red"], seeds=[0])

    assert any(not torch.equal(a, b) for a, b in zip(before, module.trained.denoiser.parameters(), strict=True))
    assert picture.size == (16, 16)


@pytest.mark.parametrize(
    ("autoencoder", "weights", "message"),
    [
        (
            tiny_quantized(),
            {"kl_weight": 1e-6},
            r"got kl_weight=1e-06 for a VQAutoencoder, expected quantization_weight",
        ),
        (
            KLAutoencoder(base_channels=8, channel_mult=[1], num_res_blocks=1, norm_groups=4),
            {"kl_weight": None, "quantization_weight": 1.0},
            r"got quantization_weight=1.0 for a KLAutoencoder, expected kl_weight",
        ),
    ],
    ids=["vq", "kl"],
)
def test_the_weight_of_a_loss_that_an_autoencoder_lacks_is_refused(
    autoencoder: KLAutoencoder | VQAutoencoder, weights: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        autoencoder_module(autoencoder=autoencoder, **weights)


def test_published_weights_are_taken_where_none_is_given() -> None:
    modules = [vq_module(), autoencoder_module(kl_weight=None)]
    assert [module.regularization_weight for module in modules] == [1.0, 1e-6]
