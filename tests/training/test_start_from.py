"""A stage of a chain begins with what the stage before it learned."""

from pathlib import Path

import pytest
import torch
from tiny_models import autoencoder_module, fill, latent_diffusion_module, tiny_denoiser
from torch.testing import assert_close

from ldm.diffusion import Conditioning, Denoiser
from ldm.networks import UNet
from ldm.nn.weights import save_weights
from ldm.training.frozen import drop_frozen
from ldm.training.start_from import start_from


def write(folder: Path) -> Path:
    module = latent_diffusion_module()
    state = drop_frozen(module.ema.module, module.ema.module.state_dict())
    save_weights(folder / "weights.safetensors", state, target="ldm.training.LatentDiffusionModule", config={})
    return folder


def denoiser(in_channels: int, **options: int) -> Denoiser:
    plain = tiny_denoiser()
    geometry = {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2]}
    network = UNet(in_channels, 4, **(geometry | {"num_heads": 2, "context_dim": 8, "norm_groups": 4} | options))
    return Denoiser(
        network,
        schedule=plain.schedule,
        parameterization=plain.parameterization,
        weighting=plain.weighting,
        times=plain.times,
    )


def test_network_conditioner_and_average_take_the_weights_over(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = latent_diffusion_module(denoiser=denoiser(4))
    assert start_from(module, write(tmp_path)) == []
    other = latent_diffusion_module()
    for mine, theirs in ((module.trained, other.trained), (module.ema.module, other.ema.module)):
        assert_close(dict(mine.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


def test_new_input_channels_change_nothing_at_first(tmp_path: Path) -> None:
    module = latent_diffusion_module(denoiser=denoiser(9))
    grown = start_from(module, write(tmp_path) / "weights.safetensors")
    assert grown == ["denoiser.network.input_blocks.0.0.weight"]
    x, t, context = torch.randn(2, 4, 8, 8), torch.zeros(2), torch.randn(2, 3, 8)
    extra = torch.randn(2, 5, 8, 8)
    before = tiny_denoiser().network(x, t, Conditioning(context=context))
    after = module.trained.denoiser.network(x, t, Conditioning(context=context, concat=extra))
    assert_close(after, before)


def test_a_vector_that_was_not_told_before_changes_nothing_at_first(tmp_path: Path) -> None:
    module = latent_diffusion_module(denoiser=denoiser(4, vector_dim=6))
    new = start_from(module, write(tmp_path))
    assert new == [f"denoiser.network.label_emb.0.2.{name}" for name in ("weight", "bias")]
    x, t, context = torch.randn(2, 4, 8, 8), torch.zeros(2), torch.randn(2, 3, 8)
    before = tiny_denoiser().network(x, t, Conditioning(context=context))
    network = module.trained.denoiser.network
    after = network(x, t, Conditioning(context=context, vector=torch.randn(2, 6)))
    assert_close(after, before)
    after.sum().backward()
    assert network.label_emb[0][2].weight.grad.abs().sum() > 0


def test_another_geometry_is_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path)
    with pytest.raises(ValueError, match=r"start_from: got denoiser\.network\.input_blocks\.0\.0\.bias of shape"):
        start_from(latent_diffusion_module(denoiser=denoiser(4, model_channels=16)), folder)
    with pytest.raises(ValueError, match=r"start_from: got weights without [1-9]\d* of the model's"):
        start_from(latent_diffusion_module(denoiser=denoiser(4, num_res_blocks=2)), folder)


def test_an_autoencoder_goes_on_from_another(tmp_path: Path) -> None:
    first, second = autoencoder_module(), autoencoder_module()
    for parameter in first.autoencoder.parameters():
        parameter.data += 0.5
    save_weights(
        tmp_path / "autoencoder.safetensors",
        first.autoencoder.state_dict(),
        target="ldm.autoencoders.KLAutoencoder",
        config={},
    )
    fill(second.autoencoder)
    start_from(second, tmp_path)
    assert_close(dict(second.autoencoder.state_dict()), dict(first.autoencoder.state_dict()), rtol=0, atol=0)
