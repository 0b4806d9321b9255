import warnings
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from ldm.autoencoders import KLAutoencoder, decode_safely, decode_tiled, encode_safely

OVERFLOW = r"overflowed float16 and was done again in float32"


def autoencoder_with_branches_of(size: float) -> KLAutoencoder:
    """In float16, adding numbers about that size twice before the output norm, which takes them off again."""
    torch.manual_seed(0)
    autoencoder = KLAutoencoder(base_channels=8, channel_mult=[1, 2], num_res_blocks=1, norm_groups=4, latent_scale=0.5)
    for block in (*autoencoder.decoder.up[0].block, autoencoder.encoder.mid.block_1, autoencoder.encoder.mid.block_2):
        torch.nn.init.constant_(block.conv2.bias, size)
    return autoencoder.half().eval()


def latents() -> torch.Tensor:
    return torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0)).half()


def test_an_overflow_is_decoded_again_in_float32_with_a_warning() -> None:
    autoencoder = autoencoder_with_branches_of(6e4)
    assert not autoencoder.decode(latents()).isfinite().all()

    with pytest.warns(UserWarning, match=OVERFLOW):
        images = decode_safely(autoencoder, latents())

    assert_close(images, autoencoder.float().decode(latents().float()), rtol=0, atol=0)


@pytest.mark.parametrize("is_cast", [False, True])
def test_an_overflow_is_encoded_again_in_float32_with_a_warning(is_cast: bool) -> None:
    """With weights in float16, and with an autocast to it as in training."""
    autoencoder, images = autoencoder_with_branches_of(6e4), torch.zeros(1, 3, 12, 12).half()
    if is_cast:
        autoencoder, images = autoencoder.float(), images.float()

    with torch.autocast("cpu", torch.float16, enabled=is_cast), pytest.warns(UserWarning, match=OVERFLOW):
        assert not autoencoder.encode(images).isfinite().all()
        moments = encode_safely(autoencoder, images)

    assert_close(moments, autoencoder.float().encode(images.float()), rtol=0, atol=0)


def test_the_module_keeps_its_very_tensors() -> None:
    autoencoder = autoencoder_with_branches_of(6e4)
    before = {name: (tensor, tensor.clone()) for name, tensor in autoencoder.state_dict(keep_vars=True).items()}

    with pytest.warns(UserWarning, match=OVERFLOW):
        decode_safely(autoencoder, latents())

    after = autoencoder.state_dict(keep_vars=True)
    assert all(after[name] is tensor for name, (tensor, _) in before.items())
    assert_close({**after}, {name: copy for name, (_, copy) in before.items()}, rtol=0, atol=0)


def test_the_warning_is_shown_once() -> None:
    autoencoder = autoencoder_with_branches_of(6e4)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            decode_safely(autoencoder, latents())

    assert len(shown) == 1


def test_an_overflow_of_one_tile_is_decoded_again_tile_by_tile() -> None:
    autoencoder, tiled = autoencoder_with_branches_of(6e4), partial(decode_tiled, tile=4, overlap=1)

    with pytest.warns(UserWarning, match=OVERFLOW):
        images = decode_safely(autoencoder, latents(), decode=tiled)

    assert_close(images, tiled(autoencoder.float(), latents().float()), rtol=0, atol=0)


def test_what_fits_into_float16_stays_there() -> None:
    autoencoder = autoencoder_with_branches_of(10.0)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = decode_safely(autoencoder, latents())

    assert_close(images, autoencoder.decode(latents()).detach(), rtol=0, atol=0)
    assert images.dtype == torch.float16


@pytest.mark.parametrize("case", ["bfloat16", "latents that are not finite"])
def test_what_float32_would_not_help_is_not_decoded_again(case: str) -> None:
    autoencoder, broken = autoencoder_with_branches_of(1.0), latents()
    broken[0, 0, 0, 0] = torch.nan
    if case == "bfloat16":
        autoencoder, broken = autoencoder.bfloat16(), broken.bfloat16()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = decode_safely(autoencoder, broken)

    assert images.dtype == broken.dtype and images.isnan().any()
