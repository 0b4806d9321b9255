import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch_fidelity.metric_prc import calculate_precision_recall_full

from ldm.metrics import DensityCoverage, PrecisionRecall
from ldm.metrics.density_coverage import density_coverage
from ldm.metrics.neighbours import neighbour_radii
from ldm.metrics.precision_recall import precision_recall


def features(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return shift + torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any result had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@given(st.integers(1, 80), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_radii_equal_brute_force_in_blocks_of_any_size(chunk_size: int, k: int) -> None:
    points = features(60, 0)
    brute = torch.from_numpy(cdist(points.double(), points.double())).sort(dim=1).values[:, k] ** 2
    assert_close(neighbour_radii(points, k, chunk_size=chunk_size), brute, rtol=1e-9, atol=1e-12)


def test_duplicates_have_no_distance_however_far_off_they_lie() -> None:
    points = features(20, 0, shift=1000.0).repeat_interleave(2, dim=0)
    assert neighbour_radii(points, 1, chunk_size=7).max() < 1e-8


def test_not_all_distances_exist_at_once() -> None:
    with LargestTensor() as largest:
        precision_recall(features(400, 0), features(400, 1), k=3, chunk_size=20)
        density_coverage(features(400, 0), features(400, 1), k=5, chunk_size=20)
    # The features themselves are the largest.
    assert largest.elements <= 400 * 3


def test_no_more_images_than_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="got 3 images, expected more than k=3"):
        neighbour_radii(features(3, 0), 3, chunk_size=10)


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_precision_and_recall_equal_torch_fidelity(shift: float) -> None:
    generated, real = features(200, 0), features(150, 1, shift)
    expected = calculate_precision_recall_full(generated, real, neighborhood=3)
    found = precision_recall(generated, real, k=3, chunk_size=64)
    assert_close([value.item() for value in found], list(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_density_and_coverage_equal_their_definition(shift: float) -> None:
    generated, real = features(200, 0).double(), features(150, 1, shift).double()
    radii = cdist(real, real)
    radii.sort(axis=1)
    within = cdist(generated, real) < radii[:, 5]
    expected = [within.sum() / (5 * 200), within.any(axis=0).mean()]
    found = density_coverage(generated, real, k=5, chunk_size=64)
    assert_close([value.item() for value in found], [float(value) for value in expected], rtol=1e-9, atol=0)


def test_identical_sets_score_ideal() -> None:
    points = features(300, 0)
    assert [value.item() for value in precision_recall(points, points, k=3, chunk_size=64)] == [1, 1]
    assert [value.item() for value in density_coverage(points, points, k=5, chunk_size=64)] == [1, 1]


def test_sets_far_apart_score_nothing() -> None:
    points, others = features(100, 0), features(100, 1, shift=100.0)
    assert [value.item() for value in precision_recall(points, others, k=3, chunk_size=64)] == [0, 0]
    assert [value.item() for value in density_coverage(points, others, k=5, chunk_size=64)] == [0, 0]


def test_one_picture_over_and_over_is_precise_and_recalls_next_to_nothing() -> None:
    real = features(300, 0)
    precision, recall = precision_recall(real[:1].expand(300, -1), real, k=3, chunk_size=64)
    assert (precision, recall) == (1, 1 / 300)


@pytest.mark.parametrize("metric", [PrecisionRecall, DensityCoverage])
@pytest.mark.parametrize("options", [{"k": 0}, {"chunk_size": 0}])
def test_impossible_settings_are_refused(metric, options) -> None:
    network = torch.nn.Identity()
    network.num_features = 3
    with pytest.raises(ValueError, match="expected at least 1 of each"):
        metric(network, **options)
