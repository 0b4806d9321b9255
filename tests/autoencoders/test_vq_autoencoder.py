from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ldm.autoencoders import Autoencoder, IdentityAutoencoder, KLAutoencoder, VQAutoencoder
from ldm.nn.weights import save_weights

SMALL: dict[str, Any] = {
    "latent_channels": 3,
    "num_codes": 32,
    "base_channels": 8,
    "channel_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "norm_groups": 4,
}


def small(**options: Any) -> VQAutoencoder:
    torch.manual_seed(0)
    autoencoder = VQAutoencoder(**{**SMALL, **options})
    torch.nn.init.normal_(autoencoder.quantize.embedding.weight)
    return autoencoder


def images(height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_moments_are_the_latents_before_quantisation() -> None:
    autoencoder = small()

    moments = autoencoder.encode(images(8, 20))

    assert moments.shape == (2, autoencoder.moment_channels, 2, 5) == (2, *autoencoder.latent_shape(images(8, 20)))
    distances = (moments[:, :, None] - autoencoder.quantize.embedding.weight.T[None, :, :, None, None]).square().sum(1)
    assert distances.amin() > 1e-3
    assert_close(autoencoder.codes(moments), distances.argmin(1))


def test_noise_does_not_enter_latents() -> None:
    autoencoder = small(latent_scale=0.5, latent_shift=0.1)
    moments = autoencoder.encode(images())

    latents = autoencoder.to_latents(moments, noise=torch.randn(2, 3, 4, 4))

    assert_close(latents, (moments - 0.1) * 0.5)
    assert_close(autoencoder.to_latents(moments, noise=None), latents, rtol=0, atol=0)


def test_decoding_quantises_first() -> None:
    """Latents that share their nearest entries, whatever the scale, decode to one picture: that of the entries."""
    autoencoder = small()
    codes = torch.randint(32, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    entries = autoencoder.quantize.entries(codes)
    expected = autoencoder.decode_quantized(entries)

    autoencoder.set_latent_scale(0.4, 0.3)

    assert_close(autoencoder.decode(autoencoder.scaled(entries + 1e-3)), expected)
    assert (autoencoder.decode_quantized(entries + 0.5) - expected).abs().max() > 1e-3


def test_training_pass_is_encoding_and_decoding_with_the_loss_of_the_codebook() -> None:
    autoencoder = small(latent_scale=0.5)
    moments = autoencoder.encode(images())

    reconstructions, loss = autoencoder(images(), noise=torch.randn(2, 3, 4, 4))

    assert_close(reconstructions, autoencoder.decode(autoencoder.to_latents(moments, noise=None)))
    entries = autoencoder.quantize.entries(autoencoder.codes(moments))
    assert_close(loss, 1.25 * (moments - entries).square().mean())


def test_gradient_reaches_every_parameter() -> None:
    autoencoder = small(attn_resolutions=[4], resolution=16)

    reconstructions, loss = autoencoder(images(), noise=torch.randn(2, 3, 4, 4))
    ((reconstructions - images()).square().mean() + loss).backward()

    assert [name for name, p in autoencoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_reconstruction_alone_moves_the_encoder_but_not_the_codebook() -> None:
    autoencoder = small()

    reconstructions, _ = autoencoder(images(), noise=torch.randn(2, 3, 4, 4))
    (reconstructions - images()).square().mean().backward()

    assert autoencoder.encoder.conv_in.weight.grad.any()
    assert autoencoder.quantize.embedding.weight.grad is None


def test_images_out_of_range_or_of_a_size_that_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="got images of 16x18, expected multiples of 4"):
        small().encode(images(16, 18))
    with pytest.raises(ValueError, match=r"expected \[-1, 1\]"):
        small().encode(images() * 2)


@pytest.mark.parametrize("kind", [VQAutoencoder, Autoencoder])
def test_loading_rebuilds_the_autoencoder(kind: type[Autoencoder], tmp_path: Path) -> None:
    saved, path = small(latent_scale=0.3), tmp_path / "autoencoder.safetensors"
    save_weights(path, saved.state_dict(), target="ldm.autoencoders.VQAutoencoder", config=saved.arguments)

    loaded = kind.load(path)

    assert type(loaded) is VQAutoencoder and not loaded.training
    assert_close(dict(loaded.state_dict()), dict(saved.state_dict()), rtol=0, atol=0)


def test_a_file_of_the_other_kind_is_refused_by_a_kind_and_taken_by_all(tmp_path: Path) -> None:
    path, arguments = tmp_path / "kl.safetensors", {k: v for k, v in SMALL.items() if k != "num_codes"}
    saved = KLAutoencoder(**arguments)
    save_weights(path, saved.state_dict(), target="ldm.autoencoders.KLAutoencoder", config=arguments)

    assert type(Autoencoder.load(path)) is KLAutoencoder
    with pytest.raises(ValueError, match=r"of ldm\.autoencoders\.KLAutoencoder .* expected ldm\.autoencoders\.VQAuto"):
        VQAutoencoder.load(path)


def test_mean_and_std_say_how_certain_latents_are() -> None:
    quantized, identity = small(), IdentityAutoencoder()
    mean, std = quantized.mean_and_std(quantized.encode(images()))
    assert_close(mean, quantized.encode(images()))
    assert not std.any()

    mean, std = identity.mean_and_std(identity.encode(images()))
    assert_close(mean, images())
    assert_close(std, torch.full_like(std, 3.059e-7), rtol=1e-3, atol=0)
