import pytest
import torch
from torch.testing import assert_close

from ldm.training.losses import adaptive_weight, discriminator_hinge_loss, generator_loss, reconstruction_loss


def test_reconstruction_is_absolute_error_summed_over_an_image_or_a_mean_over_values() -> None:
    images, offset = torch.zeros(4, 3, 5, 6), torch.tensor([0.5, -0.5, 1.0, 0.0]).view(4, 1, 1, 1)
    assert_close(reconstruction_loss(images, images + offset), torch.tensor(0.5 * 3 * 5 * 6))
    assert_close(reconstruction_loss(images, images + offset, per="value"), torch.tensor(0.5))


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="got per='pixel', expected 'image' or 'value'"):
        reconstruction_loss(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), per="pixel")


@pytest.mark.parametrize(
    ("real", "fake", "expected"), [(2.0, -3.0, 0.0), (0.0, 0.0, 1.0), (-1.0, -3.0, 1.0), (3.0, 1.0, 1.0)]
)
def test_the_hinge_is_open_where_the_discriminator_is_unsure_or_wrong(
    real: float, fake: float, expected: float
) -> None:
    patches = torch.ones(2, 1, 3, 3)
    assert_close(discriminator_hinge_loss(real * patches, fake * patches), torch.tensor(expected))


def test_the_generator_wants_high_logits() -> None:
    assert_close(generator_loss(torch.tensor([[1.0, 3.0]])), torch.tensor(-2.0))


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms_without_a_gradient() -> None:
    layer = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    toward, away = torch.tensor([3.0, 4.0, 0.0]).double(), torch.tensor([0.0, 0.0, 0.5]).double()
    weight = adaptive_weight((layer * toward).sum(), (layer * away).sum(), layer)
    assert_close(weight, torch.tensor(5 / (0.5 + 1e-4), dtype=torch.float64))
    assert not weight.requires_grad
    assert layer.grad is None


def test_the_adaptive_weight_is_bounded_where_the_adversary_has_no_gradient() -> None:
    layer = torch.nn.Parameter(torch.ones(3))
    assert_close(adaptive_weight((1e3 * layer).sum(), (0 * layer).sum(), layer), torch.tensor(1e4))
