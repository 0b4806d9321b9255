from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm.autoencoders import KLAutoencoder
from ldm.nn.weights import save_weights

SMALL: dict[str, Any] = {
    "latent_channels": 2,
    "base_channels": 8,
    "channel_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "norm_groups": 4,
}


def images(height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 20)])
def test_decoding_gives_back_the_shape_that_was_encoded(height: int, width: int) -> None:
    autoencoder = KLAutoencoder(**SMALL)

    moments = autoencoder.encode(images(height, width))
    latents = autoencoder.to_latents(moments, noise=torch.randn(2, 2, height // 4, width // 4))

    assert moments.shape == (2, 4, height // 4, width // 4)
    assert autoencoder.decode(latents).shape == (2, 3, height, width)


def test_decoding_undoes_the_latent_scale() -> None:
    autoencoder = KLAutoencoder(**SMALL)
    moments = autoencoder.encode(images())
    expected = autoencoder.decode(autoencoder.to_latents(moments, noise=None))

    autoencoder.set_latent_scale(0.18215, 0.7)

    torch.testing.assert_close(
        autoencoder.decode(autoencoder.to_latents(moments, noise=None)), expected, rtol=1e-4, atol=1e-5
    )


def test_downsampling_pads_on_the_right_and_bottom_alone() -> None:
    layer = KLAutoencoder(**SMALL).encoder.down[0].downsample
    nn.init.ones_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)

    out = layer(torch.ones(1, 8, 4, 4))

    torch.testing.assert_close(out[0, 0] / 8, torch.tensor([[9.0, 6.0], [6.0, 4.0]]))


def test_gradient_reaches_every_parameter() -> None:
    autoencoder = KLAutoencoder(**SMALL, attn_resolutions=[4], resolution=16)

    moments = autoencoder.encode(images())
    reconstruction = autoencoder.decode(autoencoder.to_latents(moments, noise=torch.randn(2, 2, 4, 4)))
    ((reconstruction - images()).square().mean() + autoencoder.posterior(moments).kl().mean()).backward()

    assert [name for name, p in autoencoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_middle_without_attention_has_no_weights_for_it() -> None:
    names = KLAutoencoder(**SMALL, attention_type="none").state_dict()

    assert [name for name in names if "attn" in name] == []
    assert any("attn_1" in name for name in KLAutoencoder(**SMALL).state_dict())


@pytest.mark.parametrize("value", [1.01, -1.01, float("nan")])
def test_images_outside_their_range_are_refused(value: float) -> None:
    outside = images()
    outside[1, 2, 3, 4] = value

    with pytest.raises(ValueError, match=r"expected \[-1, 1\]"):
        KLAutoencoder(**SMALL).encode(outside)


def test_images_off_their_range_by_rounding_are_taken() -> None:
    assert KLAutoencoder(**SMALL).encode(images().sign() * 1.0005).isfinite().all()


def test_images_of_a_size_that_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="got images of 16x18, expected multiples of 4"):
        KLAutoencoder(**SMALL).encode(images(16, 18))


def test_loading_rebuilds_the_autoencoder_with_its_scale(tmp_path: Path) -> None:
    saved = KLAutoencoder(**SMALL)
    saved.set_latent_scale(0.3, 0.1)
    path = tmp_path / "autoencoder.safetensors"
    save_weights(path, saved.state_dict(), target="ldm.autoencoders.KLAutoencoder", config=SMALL)

    loaded = KLAutoencoder.load(path)

    assert not loaded.training
    saved.eval()
    moments = saved.encode(images())
    torch.testing.assert_close(loaded.encode(images()), moments, rtol=0, atol=0)
    torch.testing.assert_close(loaded.to_latents(moments, noise=None), saved.to_latents(moments, noise=None))


def test_weights_of_another_module_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "linear.safetensors"
    save_weights(path, nn.Linear(2, 2).state_dict(), target="torch.nn.Linear", config={})

    with pytest.raises(ValueError, match=r"got weights of torch\.nn\.Linear .* expected ldm\.autoencoders"):
        KLAutoencoder.load(path)


ILL_POSED: dict[str, tuple[Mapping[str, Any], str]] = {
    "attention at no level": ({"attn_resolutions": [5], "resolution": 16}, r"for feature maps of \[16, 8, 4\]"),
    "attention without a resolution": ({"attn_resolutions": [4]}, "set resolution to the training image size"),
    "resolution without attention": ({"resolution": 16}, "got resolution 16 without attn_resolutions"),
    "attention switched off": (
        {"attn_resolutions": [4], "resolution": 16, "attention_type": "none"},
        "with attention_type 'none', expected none",
    ),
    "unknown attention": ({"attention_type": "linear"}, "got attention_type 'linear', expected 'vanilla' or 'none'"),
    "channels by groups": ({"norm_groups": 3}, "got 8 channels for 3 normalisation groups"),
    "no levels": ({"channel_mult": []}, "got an empty channel_mult"),
    "no blocks": ({"num_res_blocks": 0}, "got num_res_blocks 0, expected at least 1"),
}


@pytest.mark.parametrize("name", ILL_POSED)
def test_an_ill_posed_geometry_is_refused(name: str) -> None:
    change, message = ILL_POSED[name]

    with pytest.raises(ValueError, match=message):
        KLAutoencoder(**{**SMALL, **change})
