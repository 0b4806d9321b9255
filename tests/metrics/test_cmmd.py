import numpy as np
import torch
from metric_helpers import Pixels, images
from torch.testing import assert_close

from ldm.metrics import CLIPDiscrepancy, as_seen
from ldm.metrics.cmmd import gaussian_mmd


def normal(count: int, mean: float, deviation: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + deviation * torch.randn(count, 2, generator=generator, dtype=torch.float64)


def published(x: np.ndarray, y: np.ndarray) -> float:
    """1000 times the estimator of Gretton et al. 2012, eq. 5, by its definition."""

    def mean_kernel(a, b):
        return np.exp(-((a[:, None] - b) ** 2).sum(-1) / (2 * 10**2)).mean()

    return 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def filled(generated: torch.Tensor, real: torch.Tensor) -> CLIPDiscrepancy:
    metric = CLIPDiscrepancy(Pixels())
    metric.update(real, torch.arange(len(real)), real=True)
    metric.update(generated, torch.arange(len(generated)), real=False)
    return metric


def test_the_value_is_the_published_estimator() -> None:
    real, generated = images(50, seed=0), images(40, seed=1) * 0.5
    network = Pixels()
    expected = published(network(as_seen(generated)).numpy(), network(as_seen(real)).numpy())
    assert_close(filled(generated, real).compute().item(), expected, rtol=1e-6, atol=0)


def test_two_normal_distributions_have_the_closed_form() -> None:
    def kernel(variance: float, distance: float) -> float:
        # E exp(-|x - y|^2 / (2 s^2)) for x - y ~ N(distance, variance) in two dimensions, s = 2.
        return 4 / (4 + variance) * np.exp(-2 * distance**2 / (2 * (4 + variance)))

    expected = kernel(2, 0) + kernel(0.5, 0) - 2 * kernel(1.25, 1)
    drawn = torch.stack(
        [gaussian_mmd(normal(500, 0, 1, 2 * i), normal(500, 1, 0.5, 2 * i + 1), sigma=2.0) for i in range(30)]
    )
    # The estimator counts each image with itself: (1 - E k) / N more on each side.
    bias = (1 - kernel(2, 0)) / 500 + (1 - kernel(0.5, 0)) / 500
    assert abs(drawn.mean() - expected - bias) < 5 * drawn.std() / 30**0.5


def test_identical_sets_are_at_distance_zero() -> None:
    assert abs(filled(images(50), images(50)).compute()) < 1e-9


def test_blocks_make_no_difference(monkeypatch) -> None:
    whole = filled(images(50), images(40, seed=1)).compute()
    monkeypatch.setattr("ldm.metrics.products.BLOCK", 7)
    assert_close(filled(images(50), images(40, seed=1)).compute(), whole, rtol=1e-10, atol=0)
