import math

import pytest
import torch
from torch import Tensor

from ldm.nn.magnitude_preserving import (
    MPConv,
    MPFourier,
    MPLinear,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize_weights,
    unit_magnitude,
)

LAYERS = {"linear": lambda: MPLinear(48, 6), "conv": lambda: MPConv(16, 6, 3)}


def magnitude(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_unit_magnitude_has_root_mean_square_one_and_keeps_the_direction() -> None:
    x = 7 * normal(3, 5, 4)
    unit = unit_magnitude(x, dim=1)

    torch.testing.assert_close(unit.square().mean(1), torch.ones(3, 4).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(unit / unit[:, :1], x / x[:, :1])


def test_nothing_stays_nothing() -> None:
    torch.testing.assert_close(unit_magnitude(torch.zeros(2, 3), dim=1), torch.zeros(2, 3))


def test_silu_of_normal_numbers_has_magnitude_one() -> None:
    assert magnitude(mp_silu(normal(200_000))) == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("balance", [0.0, 0.3, 0.5, 1.0])
def test_a_sum_keeps_the_magnitude_and_holds_its_parts_in_the_given_balance(balance: float) -> None:
    a, b = normal(100_000), normal(100_000, seed=1)
    total = mp_sum(a, b, balance=balance)

    assert magnitude(total) == pytest.approx(1, abs=0.01)
    part_a, part_b = ((total * part).mean().item() for part in (a, b))
    assert part_b * (1 - balance) == pytest.approx(part_a * balance, abs=0.01)


@pytest.mark.parametrize("balance", [0.3, 0.5])
def test_a_concatenation_keeps_the_magnitude_and_balances_parts_of_unequal_width(balance: float) -> None:
    a, b = normal(2, 24, 64, 64), normal(2, 8, 64, 64, seed=1)
    joined = mp_cat(a, b, balance=balance)

    assert magnitude(joined) == pytest.approx(1, abs=0.01)
    energy_a, energy_b = (part.square().sum().sqrt().item() for part in joined.split([24, 8], dim=1))
    assert energy_a * balance == pytest.approx(energy_b * (1 - balance), rel=0.02)


def test_fourier_features_have_magnitude_one_and_depend_on_time() -> None:
    torch.manual_seed(0)
    features = MPFourier(4000)(torch.tensor([-1.0, 0.0, 2.0]))

    torch.testing.assert_close(features.square().mean(1), torch.ones(3), rtol=0.05, atol=0)
    assert (features @ features.T / 4000 - torch.eye(3)).abs().max() < 0.7


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_keeps_the_magnitude_of_its_input_whatever_its_weights_length(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    x = normal(2000, 48) if name == "linear" else normal(8, 16, 34, 34)
    out = layer(x)

    inner = out if name == "linear" else out[..., 1:-1, 1:-1]
    assert magnitude(inner) == pytest.approx(1, abs=0.05)
    with torch.no_grad():
        layer.weight.mul_(10)
    torch.testing.assert_close(layer(x), out, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(layer(x, gain=3.0), 3 * layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_is_orthogonal_to_the_rows_of_the_weight(name: str) -> None:
    layer = LAYERS[name]().double()
    x = normal(4, 48) if name == "linear" else normal(2, 16, 5, 5)

    layer(x).pow(3).sum().backward()

    along = (layer.weight * layer.weight.grad).flatten(1).sum(1)
    scale = layer.weight.flatten(1).norm(dim=1) * layer.weight.grad.flatten(1).norm(dim=1)
    assert (along / scale).abs().max() < 1e-3  # not zero: the small constant in the division
    assert scale.min() > 1e-3


@pytest.mark.parametrize("name", LAYERS)
def test_normalized_weights_have_magnitude_one_and_the_layer_gives_the_same(name: str) -> None:
    layer = LAYERS[name]().double()
    with torch.no_grad():
        layer.weight.mul_(5)
    x = normal(4, 48) if name == "linear" else normal(2, 16, 5, 5)
    before = layer(x)

    normalize_weights(torch.nn.Sequential(layer))

    rows = layer.weight.flatten(1)
    torch.testing.assert_close(rows.norm(dim=1) / math.sqrt(rows.shape[1]), torch.ones(6).double(), rtol=2e-4, atol=0)
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-6)
