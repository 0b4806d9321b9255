import warnings

import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from torch.testing import assert_close
from torchmetrics.image.fid import FrechetInceptionDistance

from ldm.metrics import FrechetDistance, Statistics, as_seen, frechet_distance


class Projection(nn.Module):
    """A fixed random linear map of the pixels, in float64 so that a batch does not change the rounding."""

    def __init__(self, num_features: int = 5) -> None:
        super().__init__()
        self.num_features = num_features
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("matrix", torch.randn(3 * 4 * 4, num_features, generator=generator).double())

    def forward(self, images):
        return images.double().flatten(1) @ self.matrix


def images(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def covariance(size: int, seed: int) -> torch.Tensor:
    factor = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T


def filled(reals: torch.Tensor, generated: torch.Tensor, *, batch_size: int = 64) -> FrechetDistance:
    metric = FrechetDistance(Projection())
    for batch in reals.split(batch_size):
        metric.update(batch, real=True)
    for batch in generated.split(batch_size):
        metric.update(batch, real=False)
    return metric


def test_diagonal_gaussians_have_the_closed_form() -> None:
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 1.0]).double()
    mean = torch.tensor([1.0, 0.0, -2.0]).double()
    distance = frechet_distance(Statistics(mean, a.diag()), Statistics(torch.zeros(3).double(), b.diag()))
    assert_close(distance, torch.tensor(5.0 + 1.0 + 0.0 + 4.0).double())


def test_the_trace_of_the_root_equals_scipys() -> None:
    a, b = covariance(30, 0), covariance(30, 1)
    zero = torch.zeros(30).double()
    expected = a.trace() + b.trace() - 2 * float(sqrtm((a @ b).numpy()).real.trace())
    assert_close(frechet_distance(Statistics(zero, a), Statistics(zero, b)), expected, rtol=1e-9, atol=0)


def test_the_distance_of_a_singular_gaussian_from_itself_is_zero() -> None:
    factor = torch.randn(40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    singular = factor @ factor.T
    one, other = (Statistics(torch.zeros(40).double(), singular) for _ in range(2))
    assert frechet_distance(one, other) < 1e-9


def test_identical_sets_are_at_distance_zero() -> None:
    assert filled(images(100, 0), images(100, 0)).compute() < 1e-9


def test_a_shift_of_all_images_costs_its_square() -> None:
    reals = as_seen(images(100, 0) * 0.5)
    shift = 20 / 127.5
    expected = (torch.full((1, 3, 4, 4), shift).double().flatten(1) @ Projection().matrix).square().sum()
    assert_close(filled(reals, reals + shift).compute(), expected, rtol=1e-4, atol=0)


def test_the_value_depends_on_neither_batch_size_nor_order() -> None:
    reals, generated = images(100, 0), images(90, 1)
    expected = filled(reals, generated).compute()
    shuffled = generated[torch.randperm(90, generator=torch.Generator().manual_seed(2))]
    assert_close(filled(reals.flip(0), shuffled, batch_size=7).compute(), expected, rtol=1e-9, atol=0)


def test_two_ranks_merge_to_the_value_of_one() -> None:
    reals, generated = images(100, 0), images(90, 1)
    merged = filled(reals[:37], generated[:50])
    merged.merge_state(filled(reals[37:], generated[50:]))
    assert_close(merged.compute(), filled(reals, generated).compute(), rtol=1e-9, atol=0)


def test_the_value_equals_torchmetrics() -> None:
    reals, generated = images(100, 0), images(90, 1) * 0.7
    oracle = FrechetInceptionDistance(Projection(), input_img_size=(3, 4, 4), normalize=True)
    oracle.update(as_seen(reals), real=True)
    oracle.update(as_seen(generated), real=False)
    assert_close(filled(reals, generated).compute(), oracle.compute(), rtol=1e-9, atol=0)


def test_pixels_beyond_the_range_count_as_clamped() -> None:
    reals, generated = images(50, 0), images(50, 1) * 1.2
    clamped = filled(reals, generated.clamp(-1, 1)).compute()
    assert_close(filled(reals, generated).compute(), clamped, rtol=0, atol=0)


def test_fewer_images_than_dimensions_warns_and_says_how_many() -> None:
    with pytest.warns(UserWarning, match="4 generated and 50 real images in 5 dimensions"):
        filled(images(50, 0), images(4, 1)).compute()


def test_enough_images_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filled(images(50, 0), images(50, 1)).compute()


def test_without_images_there_is_no_distance() -> None:
    assert filled(images(1, 0), images(50, 1)).compute().isnan()
