import math
from typing import Any

import pytest
import torch
from network_helpers import perturbed, seeded
from torch import nn

from ldm.diffusion.conditioning import Conditioning
from ldm.networks import EDM2UNet
from ldm.networks.edm2_unet import CosineAttention
from ldm.nn.magnitude_preserving import UnitWeight

SMALL: dict[str, Any] = {
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 2,
    "attention_resolutions": [2],
    "num_head_channels": 16,
    "num_classes": 5,
}
COND = Conditioning(vector=torch.tensor([0, 1, 4, 5]))
TIMES = torch.tensor([-1.2, -0.5, 0.0, 0.8])


def built(**changes: Any) -> EDM2UNet:
    torch.manual_seed(0)
    return EDM2UNet(4, 4, **{**SMALL, **changes})


def row_magnitudes(network: nn.Module) -> torch.Tensor:
    layers = [layer for layer in network.modules() if isinstance(layer, UnitWeight)]
    rows = [layer.weight.flatten(1) for layer in layers]
    return torch.cat([row.norm(dim=1) / math.sqrt(row.shape[1]) for row in rows])


def magnitudes_of_blocks(network: EDM2UNet) -> list[float]:
    found: list[float] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: found.append(out.square().mean().sqrt().item()))
        for block in [network.stem, *network.encoder, *network.decoder]
    ]
    network(seeded(4, 4, 16, 16), TIMES, COND)
    for hook in hooks:
        hook.remove()
    return found


def test_every_activation_has_a_magnitude_of_about_one_at_the_start() -> None:
    magnitudes = magnitudes_of_blocks(built())

    assert len(magnitudes) == 1 + 5 + 9
    # Attention averages, and zeros lie beyond the border: both take away a little, and no block makes it worse.
    assert all(0.75 < magnitude < 1.1 for magnitude in magnitudes)


def test_activations_keep_their_magnitude_whatever_the_length_of_the_weights() -> None:
    network = built()
    expected = magnitudes_of_blocks(network)

    with torch.no_grad():
        for index, layer in enumerate(layer for layer in network.modules() if isinstance(layer, UnitWeight)):
            layer.weight.mul_(2.0 ** (index % 7))

    assert magnitudes_of_blocks(network) == pytest.approx(expected, rel=1e-2)


def test_weights_are_of_magnitude_one_after_every_step() -> None:
    network = perturbed(built())  # gains of zero would keep the first gradients from most weights
    network.after_optimizer_step()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)

    for _ in range(3):
        optimizer.zero_grad()
        (network(seeded(4, 4, 8, 8), TIMES, COND) - seeded(4, 4, 8, 8, seed=1)).square().mean().backward()
        optimizer.step()
        assert (row_magnitudes(network) - 1).abs().max() > 3e-3  # an optimizer's step leaves the sphere
        network.after_optimizer_step()
        torch.testing.assert_close(row_magnitudes(network), torch.ones_like(row_magnitudes(network)), rtol=1e-3, atol=0)


def test_weights_are_of_magnitude_one_at_the_start() -> None:
    magnitudes = row_magnitudes(built())
    torch.testing.assert_close(magnitudes, torch.ones_like(magnitudes), rtol=1e-3, atol=0)


def test_two_networks_with_the_same_directions_of_weights_give_the_same() -> None:
    network = perturbed(built(), scale=0.5).eval()
    x = seeded(4, 4, 8, 8)
    expected = network(x, TIMES, COND)

    network.after_optimizer_step()

    torch.testing.assert_close(network(x, TIMES, COND), expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


def test_attention_is_that_of_the_paper_head_by_head() -> None:
    attention = CosineAttention(12, num_head_channels=4).double()
    x = 3 * seeded(1, 12, 2, 3).double()
    q, k, v = attention.qkv(x).flatten(2)[0].split(12)
    heads = []

    for head in range(3):
        unit = [part[4 * head : 4 * head + 4] for part in (q, k, v)]
        unit = [part / (part.square().mean(0).sqrt() + 1e-4) for part in unit]
        weights = (unit[0].T @ unit[1] / 2).softmax(dim=1)
        heads.append(unit[2] @ weights.T)
    found = attention.proj(torch.cat(heads).reshape(1, 12, 2, 3))

    torch.testing.assert_close(attention(x), (0.7 * x + 0.3 * found) / math.sqrt(0.7**2 + 0.3**2))


def test_an_input_of_zero_is_seen_as_the_channel_of_ones() -> None:
    network = built()
    stem = network.stem(torch.cat([torch.zeros(1, 4, 8, 8), torch.ones(1, 1, 8, 8)], dim=1))
    seen: list[torch.Tensor] = []

    network.stem.register_forward_hook(lambda _, __, out: seen.append(out))
    network(torch.zeros(1, 4, 8, 8), TIMES[:1], Conditioning(vector=torch.tensor([0])))

    torch.testing.assert_close(seen[0], stem, rtol=0, atol=0)
    assert stem.abs().max() > 0.1


def test_the_embedding_has_passed_the_activation_and_keeps_its_magnitude() -> None:
    emb = built(model_channels=512).embedding(TIMES, COND, torch.float32)

    assert emb.min() >= -0.2785 / 0.596  # where SiLU is least
    assert emb.max() > 1
    assert emb[:3].square().mean(1).sqrt().tolist() == pytest.approx([1, 1, 1], abs=0.15)


def test_activations_are_clipped() -> None:
    network = built().eval()
    block = network.decoder[1]
    emb = seeded(1, 64)

    assert block(1e6 * seeded(1, 64, 4, 4), emb).abs().max() == 256


def test_the_uncertainty_depends_on_the_noise_level_alone_and_can_be_learned() -> None:
    network = built(uncertainty_channels=16)
    network.log_variance(TIMES).square().sum().backward()

    assert network.log_variance(TIMES).shape == (4,)
    assert network.log_variance(TIMES).std() > 0.1
    assert [key for key, p in network.named_parameters() if p.grad is not None] == ["uncertainty.linear.weight"]


def test_the_uncertainty_is_not_rounded_under_autocast() -> None:
    network = built(uncertainty_channels=16)
    with torch.autocast("cpu", torch.bfloat16):
        found = network.log_variance(TIMES)
    torch.testing.assert_close(found, network.log_variance(TIMES), rtol=0, atol=0)


def test_an_uncertainty_that_was_not_built_is_refused() -> None:
    with pytest.raises(ValueError, match="got a network that predicts no uncertainty"):
        built().log_variance(TIMES)


ILL_POSED = {
    "heads": ({"num_head_channels": 24}, "got 64 channels for heads of 24 channels"),
    "no levels": ({"channel_mult": [], "attention_resolutions": []}, "got an empty channel_mult"),
    "pixel sizes": ({"attention_resolutions": [16, 8]}, r"got attention_resolutions with \[8, 16\]"),
}


@pytest.mark.parametrize("name", ILL_POSED)
def test_an_ill_posed_geometry_is_refused(name: str) -> None:
    change, message = ILL_POSED[name]
    with pytest.raises(ValueError, match=message):
        built(**change)
