from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.testing import assert_close

from ldm.conditioners import Unconditional
from ldm.data import ShardDataModule
from ldm.diffusion import Denoiser, Guidance, parameterizations, schedules, times, weightings
from ldm.generation import SamplingSettings
from ldm.generation.encode import encode_dataset
from ldm.networks import DiT, EDM2UNet
from ldm.nn.magnitude_preserving import UnitWeight
from ldm.samplers import Euler, Trailing
from ldm.training import LatentDiffusionModule
from ldm.training.ema import EMA
from ldm.training.frozen import freeze
from ldm.training.latent_diffusion import VALIDATION_SEED

MakeModule = Callable[..., LatentDiffusionModule]
MakeData = Callable[..., ShardDataModule]
MakeTrainer = Callable[..., pl.Trainer]


def batch_of(n: int = 6) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(n, 3, 16, 16, generator=generator) * 2 - 1,
        "caption": ["red", "blue", "green", "red blue", "", "green"][:n],
        "index": torch.arange(n),
        "position": torch.arange(n) + 30,
    }


def sampling(scale: float) -> SamplingSettings:
    return SamplingSettings(Euler(), Trailing(), Guidance(scale=scale), num_steps=2, image_size=16)


class Snapshots(pl.Callback):
    """Keeps the trained parameters before training and after every optimizer step."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: LatentDiffusionModule) -> None:
        self.states, self.steps = [self.state(pl_module)], 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LatentDiffusionModule, *_: Any) -> None:
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            self.states.append(self.state(pl_module))

    def state(self, pl_module: LatentDiffusionModule) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in pl_module.trained.named_parameters()}


def test_moments_and_images_train_alike(make_latent_diffusion: MakeModule) -> None:
    """Latents encoded once are the latents encoded now."""
    module, batch = make_latent_diffusion(), batch_of()
    moments = {**batch, "moments": module.autoencoder.encode(batch["image"])}
    del moments["image"]
    losses = [module.loss(b, module.trained, 0, 0.1) for b in (batch, moments)]
    assert losses[0].shape == (6,)
    assert_close(losses[0], losses[1], rtol=0, atol=0)


def test_the_loss_of_a_sample_does_not_depend_on_its_batch(make_latent_diffusion: MakeModule) -> None:
    module, batch = make_latent_diffusion(), batch_of()
    whole = module.loss(batch, module.trained, 0, 0.5)
    parts = [module.loss({name: v[i : i + 2] for name, v in batch.items()}, module.trained, 0, 0.5) for i in (0, 2, 4)]
    assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def test_dropping_every_condition_is_the_null_condition(make_latent_diffusion: MakeModule) -> None:
    module, batch = make_latent_diffusion(), batch_of()
    dropped = module.loss(batch, module.trained, 0, 1.0)
    uncaptioned = module.loss({**batch, "caption": [""] * 6}, module.trained, 0, 0.0)
    kept = module.loss(batch, module.trained, 0, 0.0)
    assert_close(dropped, uncaptioned, rtol=1e-5, atol=1e-6)
    assert (dropped - kept).abs().max() > 1e-3


def test_the_share_of_dropped_conditions_is_the_dropout(make_latent_diffusion: MakeModule) -> None:
    module, batch = make_latent_diffusion(), batch_of(1)
    batch = {
        name: value * 300 if name == "caption" else value.repeat_interleave(300, 0) for name, value in batch.items()
    }
    batch["position"] = torch.arange(300)
    losses = [module.loss(batch, module.trained, 0, rate) for rate in (0.25, 0.0)]
    assert (losses[0] != losses[1]).float().mean().item() == pytest.approx(0.25, abs=0.08)


def test_validation_measures_the_moving_average_without_dropout_and_the_same_every_time(
    make_latent_diffusion: MakeModule, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    module, data = make_latent_diffusion(condition_dropout=1.0), make_data()
    with torch.no_grad():
        for parameter in module.ema.parameters():
            parameter.mul_(1.1)
    trainer = make_trainer()
    first, second = (trainer.validate(module, data, verbose=False)[0]["val/loss"] for _ in range(2))
    assert first == second
    batches = [{**batch, "position": batch["index"]} for batch in data.iterate_once("validation", 6)]
    with torch.no_grad():
        losses = torch.cat([module.loss(batch, module.ema.module, VALIDATION_SEED, 0.0) for batch in batches])
    assert first == pytest.approx(losses.mean().item(), rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_follows_optimizer_steps_in_a_real_run(
    accumulate: int, make_latent_diffusion: MakeModule, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    module, snapshots = make_latent_diffusion(ema_decay=0.3), Snapshots()
    make_trainer(max_steps=5, accumulate_grad_batches=accumulate, callbacks=[snapshots]).fit(module, make_data())
    assert len(snapshots.states) == 6
    expected = snapshots.states[0]
    for n, state in enumerate(snapshots.states[1:]):
        decay = min(0.3, (1 + n) / (10 + n))
        expected = {name: decay * expected[name] + (1 - decay) * state[name] for name in state}
    assert_close(dict(module.ema.module.named_parameters()), expected, rtol=1e-5, atol=1e-6)


def test_every_trained_parameter_learns_and_no_frozen_one_does(
    make_latent_diffusion: MakeModule, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    module = make_latent_diffusion()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    make_trainer(max_steps=3).fit(module, make_data())
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    # The words that no caption has are the only rows that stay; they share a matrix with the others.
    assert changed == {name for name in before if not name.startswith("autoencoder.")}


def test_weights_of_fixed_magnitude_have_it_again_after_every_step(
    make_latent_diffusion: MakeModule, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    geometry = {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2]}
    denoiser = Denoiser(
        EDM2UNet(4, 4, num_head_channels=8, **geometry),
        schedule=schedules.EDM(),
        parameterization=parameterizations.EDM(),
        weighting=weightings.EDM(),
        times=times.LogNormal(),
    )
    module = make_latent_diffusion(
        denoiser=denoiser,
        conditioner=Unconditional(),
        sampling=sampling(1.0),
        optimizer=partial(torch.optim.Adam, lr=0.1),
    )
    snapshots = Snapshots()
    make_trainer(max_steps=3, callbacks=[snapshots]).fit(module, make_data())
    names = [f"denoiser.network.{name}.weight" for name, part in denoiser.network.named_modules() if is_unit(part)]
    assert len(names) > 10
    for state in snapshots.states[1:]:
        rows = torch.cat([state[name].flatten(1).square().mean(1).sqrt() for name in names])
        assert_close(rows, torch.ones_like(rows), rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(snapshots.states[1][name], snapshots.states[3][name]) for name in names)


def is_unit(part: nn.Module) -> bool:
    return isinstance(part, UnitWeight)


def test_a_checkpoint_holds_what_was_trained_and_loads_strictly(
    make_latent_diffusion: MakeModule, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module, trainer = make_latent_diffusion(), make_trainer(max_steps=2)
    trainer.fit(module, make_data())
    trainer.save_checkpoint(tmp_path / "step.ckpt")
    saved = torch.load(tmp_path / "step.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in saved} == {"trained", "ema"}
    again = make_latent_diffusion()
    frozen = {name: value.clone() for name, value in again.autoencoder.state_dict().items()}
    make_trainer(max_steps=2).fit(again, make_data(), ckpt_path=tmp_path / "step.ckpt", weights_only=True)
    assert_close(dict(again.state_dict()), dict(module.state_dict()), rtol=0, atol=0)
    assert_close(dict(again.autoencoder.state_dict()), frozen, rtol=0, atol=0)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    make_latent_diffusion: MakeModule, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    whole = make_latent_diffusion()
    make_trainer(max_steps=7).fit(whole, make_data())
    begun, trainer = make_latent_diffusion(), make_trainer(max_steps=3)
    trainer.fit(begun, make_data())
    trainer.save_checkpoint(tmp_path / "step.ckpt")
    resumed = make_latent_diffusion()
    make_trainer(max_steps=7).fit(resumed, make_data(), ckpt_path=tmp_path / "step.ckpt", weights_only=True)
    assert_close(dict(resumed.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)


def test_a_frozen_conditioner_is_left_out_of_optimizer_average_and_checkpoint(
    make_latent_diffusion: MakeModule, make_trainer: MakeTrainer
) -> None:
    class Frozen(nn.Module):
        """A conditioner around frozen weights, as a pretrained text encoder is."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.encoder = freeze(inner)
            self.forward, self.null = inner.forward, inner.null  # type: ignore[method-assign]

    conditioner = Frozen(make_latent_diffusion().trained.conditioner)
    module = make_latent_diffusion(conditioner=conditioner).train()
    assert not any(part.training for part in conditioner.encoder.modules())
    module.trainer = make_trainer(max_steps=1)
    optimized = module.configure_optimizers()["optimizer"].param_groups[0]["params"]
    assert len(optimized) == len(list(module.trained.denoiser.parameters()))
    averaged, original = module.ema.module.conditioner.encoder, conditioner.encoder
    assert all(a is b for a, b in zip(averaged.parameters(), original.parameters(), strict=True))
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert not [name for name in checkpoint["state_dict"] if "encoder" in name]


def test_the_autoencoder_is_frozen_and_in_evaluation_mode_while_training(make_latent_diffusion: MakeModule) -> None:
    module = make_latent_diffusion().train()
    assert not any(part.training for part in module.autoencoder.modules())
    assert not any(parameter.requires_grad for parameter in module.autoencoder.parameters())
    assert module.trained.training and not module.ema.training


def test_it_samples_from_the_moving_average(make_latent_diffusion: MakeModule) -> None:
    module = make_latent_diffusion().eval()
    before = module.sample(["red"], seeds=[0])[0].tobytes()
    with torch.no_grad():
        for parameter in module.trained.parameters():
            parameter.zero_()
    assert module.sample(["red"], seeds=[0])[0].tobytes() == before
    module.ema = EMA(module.trained, decay=0.5)
    assert module.sample(["red"], seeds=[0])[0].tobytes() != before


def test_one_batch_is_learned_by_heart(make_latent_diffusion: MakeModule) -> None:
    """100 steps on six samples with fixed noise and times: less than a twentieth of the loss is left."""
    module, batch = make_latent_diffusion(), batch_of()
    optimizer = torch.optim.Adam(module.trained.parameters(), lr=5e-3)
    losses = []
    for _ in range(100):
        loss = module.loss(batch, module.trained, 0, 0.1).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("dropout", [-0.1, 1.5])
def test_a_dropout_that_is_no_share_is_refused(dropout: float, make_latent_diffusion: MakeModule) -> None:
    with pytest.raises(ValueError, match=f"^got condition_dropout={dropout}, expected a share from 0 to 1"):
        make_latent_diffusion(condition_dropout=dropout)


@pytest.mark.parametrize("scale", [0.0, 7.5])
def test_guidance_without_dropout_is_refused(scale: float, make_latent_diffusion: MakeModule) -> None:
    with pytest.raises(
        ValueError, match=rf"^got guidance\.scale={scale} with condition_dropout=0.*set model\.condition_dropout"
    ):
        make_latent_diffusion(condition_dropout=0.0, sampling=sampling(scale))


def test_no_dropout_without_guidance_builds(make_latent_diffusion: MakeModule) -> None:
    assert make_latent_diffusion(condition_dropout=0.0, sampling=sampling(1.0)).condition_dropout == 0.0


def test_it_trains_on_moments_of_its_own_autoencoder_and_on_no_others(
    make_latent_diffusion: MakeModule, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = make_latent_diffusion()
    encode_dataset(module.autoencoder, make_data(), tmp_path / "latents")
    folder = tmp_path / "latents"
    moments = ShardDataModule(folder / "train", folder / "validation", batch_size=6)
    make_trainer(max_steps=1).fit(module, moments)
    with torch.no_grad():
        module.autoencoder.quant_conv.weight.mul_(1.5)
    with pytest.raises(
        ValueError, match=r"got latent shards of the autoencoder .* encode the images with it: ldm data encode"
    ):
        make_trainer(max_steps=1).fit(module, moments)


def test_pictures_of_a_size_that_patches_do_not_divide_are_refused_before_training(
    make_latent_diffusion: MakeModule, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    module = make_latent_diffusion(conditioner=Unconditional())
    module.trained.denoiser.network = DiT(4, 4, patch_size=2, width=8, depth=1, num_heads=1)
    with pytest.raises(ValueError, match=r"got data\.resolution=18, expected a multiple of 4.*set data\.resolution=16"):
        make_trainer(max_steps=1).fit(module, make_data(resolution=18))
