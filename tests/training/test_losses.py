import pytest
import torch
from torch.testing import assert_close

from ldm.training.losses import (
    adaptive_weight,
    discriminator_hinge_loss,
    generator_loss,
    half_precision_scales,
    reconstruction_loss,
)


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


@pytest.mark.parametrize(("per", "severity"), [("image", 100.0), ("value", 0.01)])
def test_the_adaptive_weight_is_the_same_in_float16(per: str, severity: float) -> None:
    """Of a large picture, whose sum over all pixels float16 does not hold, nor one pixel's part in their mean."""
    torch.manual_seed(0)
    layer, judge = torch.nn.Conv2d(4, 3, 3, padding=1), torch.nn.Conv2d(3, 1, 8, 8)
    features, images = 1 + torch.rand(1, 4, 512, 512), torch.ones(1, 3, 512, 512)
    weights = []
    for dtype in (torch.float32, torch.float16):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            pictures = layer(features)
            losses = reconstruction_loss(images, pictures, per=per), generator_loss(severity * judge(pictures))
        scales = half_precision_scales(images, per=per)
        weights.append(adaptive_weight(*losses, layer.weight, scales=scales))
    assert weights[0] < 1e4
    assert_close(weights[1], weights[0], rtol=1e-2, atol=0)
