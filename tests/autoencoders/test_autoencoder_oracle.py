"""The KL autoencoder against diffusers, with random weights carried over by name."""

import re

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ldm.autoencoders import KLAutoencoder

RENAMED = {
    r"\.down\.(\d+)\.block\.": r".down_blocks.\1.resnets.",
    r"\.down\.(\d+)\.attn\.": r".down_blocks.\1.attentions.",
    r"\.down\.(\d+)\.downsample\.": r".down_blocks.\1.downsamplers.0.",
    r"\.up\.(\d+)\.block\.": r".up_blocks.\1.resnets.",
    r"\.up\.(\d+)\.attn\.": r".up_blocks.\1.attentions.",
    r"\.up\.(\d+)\.upsample\.": r".up_blocks.\1.upsamplers.0.",
    r"\.mid\.block_1\.": ".mid_block.resnets.0.",
    r"\.mid\.block_2\.": ".mid_block.resnets.1.",
    r"\.mid\.attn_1\.": ".mid_block.attentions.0.",
    r"\.norm_out\.": ".conv_norm_out.",
    r"\.nin_shortcut\.": ".conv_shortcut.",
    r"(attentions\.\d+)\.norm\.": r"\1.group_norm.",
    r"(attentions\.\d+)\.([qkv])\.": r"\1.to_\2.",
    r"(attentions\.\d+)\.proj_out\.": r"\1.to_out.0.",
}


def to_diffusers(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Weights under the names of diffusers, whose decoder counts levels from the lowest resolution."""
    converted = {}
    for name, value in state.items():
        for pattern, replacement in RENAMED.items():
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"(up_blocks\.)(\d+)", lambda match: f"{match[1]}{levels - 1 - int(match[2])}", name)
        is_attention = re.search(r"attentions\.\d+\.to_.*weight", name)
        converted[name] = value.squeeze(-1).squeeze(-1) if is_attention else value
    return converted


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("attends", [False, True])
def test_encoder_and_decoder_equal_diffusers(attends: bool) -> None:
    places = {"attn_resolutions": [8], "resolution": 32} if attends else {}
    autoencoder = KLAutoencoder(base_channels=32, channel_mult=[1, 2, 2], **places)
    kind = "Attn" if attends else ""
    other = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", f"{kind}DownEncoderBlock2D"),
        up_block_types=(f"{kind}UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
    ).eval()
    weights = {name: parameter.detach() for name, parameter in autoencoder.named_parameters()}
    other.load_state_dict(to_diffusers(weights, levels=3))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    with torch.no_grad():
        moments = autoencoder.encode(images)
        posterior = other.encode(images).latent_dist
        latents = autoencoder.to_latents(moments, noise=None)

        assert relative_difference(moments, posterior.parameters) <= 1e-4
        assert relative_difference(autoencoder.posterior(moments).kl(), posterior.kl()) <= 1e-4
        assert relative_difference(autoencoder.decode(latents), other.decode(latents).sample) <= 1e-4
