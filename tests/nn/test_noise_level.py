import math

import pytest
import torch

from ldm.nn.noise_level import FourierLevels, SinusoidalLevels


def test_sinusoidal_frequencies_fall_geometrically_from_one_to_a_ten_thousandth() -> None:
    embedded = SinusoidalLevels(6)(torch.tensor([0.7], dtype=torch.float64))

    angles = torch.tensor([[0.7, 0.007, 0.00007]], dtype=torch.float64)
    torch.testing.assert_close(embedded, torch.cat([angles.sin(), angles.cos()], dim=1))


def test_fourier_frequencies_are_fixed_and_spread_by_the_scale() -> None:
    torch.manual_seed(0)
    levels = FourierLevels(20_000, scale=16.0)

    assert levels.frequencies.std().item() == pytest.approx(16, rel=0.05)
    assert [*levels.state_dict()] == ["frequencies"] and [*levels.parameters()] == []
    angles = 2 * math.pi * 0.01 * levels.frequencies
    torch.testing.assert_close(levels(torch.tensor([0.01]))[0], torch.cat([angles.sin(), angles.cos()]))


@pytest.mark.parametrize("embedding", [SinusoidalLevels, FourierLevels])
@pytest.mark.parametrize("dim", [0, 5])
def test_a_width_that_does_not_pair_up_is_refused(embedding: type[torch.nn.Module], dim: int) -> None:
    with pytest.raises(ValueError, match=f"got an embedding of width {dim}, expected an even width"):
        embedding(dim)
