import pytest
import torch
from metric_helpers import Pixels, images
from torch.testing import assert_close
from torch_fidelity.metric_kid import kid_features_to_metric

from ldm.metrics import KernelDistance, as_seen
from ldm.metrics.kid import polynomial_mmds


def normal(count: int, mean: float, seed: int, size: int = 1) -> torch.Tensor:
    return mean + torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mmd(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return polynomial_mmds(a, b, torch.arange(len(a))[None], torch.arange(len(b))[None])[0]


def filled(generated: torch.Tensor, real: torch.Tensor, **options) -> KernelDistance:
    metric = KernelDistance(Pixels(64), **options)
    metric.update(real, torch.arange(len(real)), real=True)
    metric.update(generated, torch.arange(len(generated)), real=False)
    return metric


def test_two_normal_distributions_have_the_closed_form() -> None:
    def kernel(a: float, b: float) -> float:
        # E (xy + 1)^3 of independent x ~ N(a, 1) and y ~ N(b, 1).
        return 1 + 3 * a * b + 3 * (a * a + 1) * (b * b + 1) + (a**3 + 3 * a) * (b**3 + 3 * b)

    expected = kernel(0, 0) + kernel(1.5, 1.5) - 2 * kernel(0, 1.5)
    drawn = torch.stack([mmd(normal(1000, 0, 2 * i), normal(1000, 1.5, 2 * i + 1)) for i in range(40)])
    # Five standard errors: unbiased, at any number of images.
    assert abs(drawn.mean() - expected) < 5 * drawn.std() / 40**0.5
    small = torch.stack([mmd(normal(5, 0, 2 * i), normal(7, 1.5, 2 * i + 1)) for i in range(4000)])
    assert abs(small.mean() - expected) < 5 * small.std() / 4000**0.5


def test_subsets_of_all_images_equal_torch_fidelity() -> None:
    real, generated = images(60, seed=0), images(60, seed=1) * 0.7
    ours = filled(generated, real, num_subsets=2, subset_size=60).compute()
    network = Pixels(64)
    theirs = kid_features_to_metric(
        network(as_seen(generated)), network(as_seen(real)), kid_subsets=1, kid_subset_size=60, verbose=False
    )
    assert_close(ours["kid"].item(), theirs["kernel_inception_distance_mean"], rtol=1e-5, atol=0)


def test_the_spread_of_subsets_equals_torch_fidelitys() -> None:
    real, generated = images(300, seed=0), images(300, seed=1) * 0.7
    ours = filled(generated, real, num_subsets=400, subset_size=50).compute()
    network = Pixels(64)
    theirs = kid_features_to_metric(
        network(as_seen(generated)), network(as_seen(real)), kid_subsets=400, kid_subset_size=50, verbose=False
    )
    deviation = theirs["kernel_inception_distance_std"]
    assert abs(ours["kid"].item() - theirs["kernel_inception_distance_mean"]) < 5 * deviation * (2 / 400) ** 0.5
    assert_close(ours["kid_std"].item(), deviation, rtol=0.2, atol=0)


def test_the_interval_holds_the_subsets_but_for_a_twentieth() -> None:
    report = filled(images(300, seed=0), images(300, seed=1), num_subsets=200, subset_size=50).compute()
    assert report["kid_low"] < report["kid"] < report["kid_high"]
    # Some four standard deviations, as of a normal distribution.
    assert 3 < (report["kid_high"] - report["kid_low"]) / report["kid_std"] < 5


def test_identical_sets_are_at_distance_zero_within_the_spread() -> None:
    report = filled(images(2000), images(2000), num_subsets=100, subset_size=50).compute()
    assert abs(report["kid"]) < 5 * report["kid_std"] / 100**0.5


def test_too_few_images_for_a_subset_are_refused() -> None:
    with pytest.raises(ValueError, match="got 20 generated images for KID, expected at least subset_size=30"):
        filled(images(20), images(40), subset_size=30).compute()


@pytest.mark.parametrize("options", [{"num_subsets": 0}, {"subset_size": 1}])
def test_impossible_subsets_are_refused(options) -> None:
    with pytest.raises(ValueError, match="subsets of"):
        KernelDistance(Pixels(), **options)
