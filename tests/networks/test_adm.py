import pytest
import torch
from network_helpers import perturbed, seeded

from ldm.diffusion.conditioning import Conditioning
from ldm.networks import ADMUNet, UNet

SMALL = {
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "num_heads": 2,
    "norm_groups": 4,
}


def test_output_and_variance_are_the_two_halves_of_the_u_net() -> None:
    adm, unet = perturbed(ADMUNet(3, 6, **SMALL)), UNet(3, 6, **SMALL)
    unet.load_state_dict(adm.state_dict())
    x, t = seeded(2, 3, 8, 8), torch.tensor([1.0, 900.0])

    torch.testing.assert_close(adm(x, t, Conditioning()), unet(x, t, Conditioning()), rtol=0, atol=0)
    assert adm.learned_variance


def test_channels_that_do_not_halve_are_refused() -> None:
    with pytest.raises(ValueError, match="got out_channels 3, expected an even number"):
        ADMUNet(3, 3, **SMALL)(seeded(1, 3, 8, 8), torch.zeros(1), Conditioning())
