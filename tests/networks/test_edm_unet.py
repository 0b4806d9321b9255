import math
from typing import Any

import pytest
import torch
from network_helpers import perturbed, seeded

from ldm.diffusion.conditioning import Conditioning
from ldm.networks import EDMUNet

DDPMPP: dict[str, Any] = {
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "embedding": "sinusoidal",
    "time_channels": 16,
}
NCSNPP = {**DDPMPP, "embedding": "fourier", "resample_filter": [1, 3, 3, 1], "input_pyramid": True}


@pytest.mark.parametrize("geometry", [DDPMPP, NCSNPP])
def test_a_block_starts_as_its_way_past_the_branch_at_equal_magnitude(geometry: dict[str, Any]) -> None:
    network = EDMUNet(4, 4, **geometry)
    x, emb = seeded(2, 16, 8, 8), seeded(2, 64)

    torch.testing.assert_close(network.encoder[0](x, emb), x / math.sqrt(2), rtol=0, atol=1e-3)
    attending = network.decoder[0].attention
    wide = seeded(2, 32, 4, 4)
    torch.testing.assert_close(attending(wide), wide / math.sqrt(2), rtol=0, atol=1e-3)


def test_weights_start_xavier_uniform_and_those_of_attention_smaller() -> None:
    torch.manual_seed(0)
    network = EDMUNet(4, 4, **{**DDPMPP, "model_channels": 64})
    middle = network.decoder[0]

    bounds = {middle.affine: 6 / (256 + 128), middle.conv0: 6 / (9 * 256), middle.attention.qkv: 0.2 * 6 / (4 * 128)}
    for layer, square in bounds.items():
        assert 0.99 * math.sqrt(square) < layer.weight.abs().max() <= math.sqrt(square)
        assert not layer.bias.any()


def test_the_embedding_has_passed_the_activation() -> None:
    network = perturbed(EDMUNet(4, 4, **DDPMPP), scale=0.5)
    emb = network.embedding(torch.tensor([-1.0, 1.0]), Conditioning(), torch.float32)

    assert emb.min() >= -0.2785  # where SiLU is least
    assert emb.max() > 1


def test_an_image_that_was_not_augmented_has_labels_of_zero() -> None:
    network = perturbed(EDMUNet(3, 3, **DDPMPP, augment_dim=9))
    x, t, labels = seeded(2, 3, 8, 8), torch.tensor([-0.5, 0.5]), seeded(2, 1, 9)

    plain = network(x, t, Conditioning())

    torch.testing.assert_close(network(x, t, Conditioning(context=torch.zeros(2, 1, 9))), plain)
    assert (network(x, t, Conditioning(context=labels)) - plain).abs().max() > 1e-3


def test_no_class_is_the_network_without_its_class_weights() -> None:
    network = perturbed(EDMUNet(3, 3, **DDPMPP, num_classes=5))
    x, t, none = seeded(2, 3, 8, 8), torch.tensor([-0.5, 0.5]), Conditioning(vector=torch.tensor([5, 5]))
    expected = network(x, t, none)

    with torch.no_grad():
        network.embedding.label.weight.zero_()

    torch.testing.assert_close(network(x, t, none), expected, rtol=0, atol=0)
    torch.testing.assert_close(network(x, t, Conditioning(vector=torch.tensor([0, 3]))), expected)


def test_the_pyramid_brings_the_input_to_every_level() -> None:
    network = perturbed(EDMUNet(3, 3, **{**NCSNPP, "channel_mult": [1, 2, 2]}), scale=0.3)
    x, t = seeded(1, 3, 8, 8), torch.zeros(1)
    expected = network(x, t, Conditioning())

    with torch.no_grad():
        network.pyramid[1][0].weight.zero_()

    assert len(network.pyramid) == 2
    assert (network(x, t, Conditioning()) - expected).abs().max() > 1e-3


def test_an_unknown_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match="got embedding 'learned', expected 'sinusoidal' or 'fourier'"):
        EDMUNet(3, 3, **{**DDPMPP, "embedding": "learned"})
