"""The VQ autoencoder against diffusers, with random weights carried over by name."""

import pytest
import torch
from diffusers import VQModel
from test_autoencoder_oracle import relative_difference, to_diffusers

from ldm.autoencoders import VQAutoencoder


@pytest.mark.parametrize("geometry", ["plain", "attention in a level", "no attention in the middle"])
def test_encoding_quantising_and_decoding_equal_diffusers(geometry: str) -> None:
    torch.manual_seed(0)
    places = {"attn_resolutions": [8], "resolution": 32} if geometry == "attention in a level" else {}
    middle = "none" if geometry == "no attention in the middle" else "vanilla"
    autoencoder = VQAutoencoder(
        latent_channels=4, num_codes=64, base_channels=32, channel_mult=[1, 2, 2], attention_type=middle, **places
    )
    # Entries of the size of latents, so that many of them occur.
    torch.nn.init.normal_(autoencoder.quantize.embedding.weight, std=0.3)
    kind = "Attn" if places else ""
    other = VQModel(
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", f"{kind}DownEncoderBlock2D"),
        up_block_types=(f"{kind}UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        num_vq_embeddings=64,
        mid_block_add_attention=middle == "vanilla",
    ).eval()
    weights = {name: parameter.detach() for name, parameter in autoencoder.named_parameters()}
    other.load_state_dict(to_diffusers(weights, levels=3))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    with torch.no_grad():
        latents, expected = autoencoder.encode(images), other.encode(images).latents
        entries, loss, (_, _, codes) = other.quantize(expected)
        found = autoencoder.quantize(latents)

        assert relative_difference(latents, expected) <= 1e-4
        assert codes.unique().numel() >= 8
        torch.testing.assert_close(found.codes.flatten(), codes)
        assert relative_difference(found.latents, entries) <= 1e-4
        assert relative_difference(found.loss, loss) <= 1e-4
        assert relative_difference(autoencoder.decode(latents), other.decode(expected).sample) <= 1e-4
