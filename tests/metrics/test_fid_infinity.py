import pytest
import torch
from metric_helpers import Pixels, images
from torch import nn
from torch.testing import assert_close

from ldm.metrics import FrechetDistance, FrechetInfinity, Statistics, as_seen, frechet_distance
from ldm.metrics.fid_infinity import intercept


class Bell(nn.Module):
    """Normal features out of uniform pixels, so that the true distance is known."""

    num_features = 6

    def forward(self, images):
        # 144 pixels of variance 1/3 each make one normal number; other pixels the next.
        return images.double().reshape(len(images), 6, -1).mean(dim=2) * (3 * 72) ** 0.5


def filled(metric, count: int, seed: int):
    metric.update(images(count, seed=seed), torch.arange(count), real=False)
    return metric


def test_a_line_meets_the_axis_where_it_should() -> None:
    x = torch.tensor([0.1, 0.2, 0.4, 0.7]).double()
    assert_close(intercept(x, 3 - 2 * x), torch.tensor(3.0).double())


def test_the_extrapolated_distance_is_nearer_to_the_true_one() -> None:
    eye, zero = torch.eye(6).double(), torch.zeros(6).double()
    exact = Statistics(zero + 0.5, eye)
    true = frechet_distance(Statistics(zero, eye), exact)
    errors, biased = [], []
    for seed in range(10):
        metric = FrechetInfinity(Bell(), reference=exact, smallest=40, num_points=8)
        errors.append(filled(metric, 200, seed).compute() - true)
        plain = FrechetDistance(Bell(), reference=exact)
        plain.update(images(200, seed=seed), real=False)
        biased.append(plain.compute() - true)
    assert abs(torch.stack(errors).mean()) < 0.5 * torch.stack(biased).mean()


def test_two_points_are_a_line_through_two_distances() -> None:
    metric = FrechetInfinity(Pixels(), smallest=99, num_points=2)
    filled(metric, 100, 0).update(images(80, seed=5), torch.arange(80), real=True)
    network = Pixels()
    generated = network(as_seen(images(100)))
    real = Statistics.of(network(as_seen(images(80, seed=5))))
    candidates = []
    for left_out in range(100):
        keep = torch.arange(100) != left_out
        few, all_ = (
            frechet_distance(side, real) for side in (Statistics.of(generated[keep]), Statistics.of(generated))
        )
        candidates.append(few + (all_ - few) * (1 / 99) / (1 / 99 - 1 / 100))
    # Which image the seed leaves out is its own matter.
    assert min(abs(metric.compute() - candidate) for candidate in candidates) < 1e-4


def test_seeds_draw_other_subsets() -> None:
    found = set()
    for seed in (0, 0, 1):
        metric = FrechetInfinity(Pixels(), smallest=30, seed=seed)
        metric.update(images(80, seed=5), torch.arange(80), real=True)
        found.add(filled(metric, 80, 0).compute().item())
    assert len(found) == 2


def test_subsets_below_the_dimension_warn() -> None:
    metric = FrechetInfinity(Pixels(50), smallest=20, num_points=3, reference=None)
    metric.update(images(80, seed=5), torch.arange(80), real=True)
    with pytest.warns(UserWarning, match="FID-infinity from 20 images in 50 dimensions"):
        filled(metric, 80, 0).compute()


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="got 20 generated images, expected more than smallest=30"):
        filled(FrechetInfinity(Pixels(), smallest=30), 20, 0).compute()
