import pytest
import torch
from torch.testing import assert_close

from ldm.metrics.kid import polynomial_mmds
from ldm.metrics.products import add_gram_, both_halves, pair_sums


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cubed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b.T + 1) ** 3


@pytest.fixture(params=[4, 512])
def block(request, monkeypatch) -> int:
    monkeypatch.setattr("ldm.metrics.products.BLOCK", request.param)
    return request.param


def test_the_product_with_itself_is_whole_and_symmetric(block) -> None:
    features = normal(6, 10).float()
    total = torch.zeros(10, 10, dtype=torch.float64)
    for part in features.split(4):
        add_gram_(total, part)
    found = both_halves(total)
    assert_close(found, features.double().T @ features.double(), rtol=1e-12, atol=1e-12)
    assert torch.equal(found, found.T)


def test_pairs_of_two_sets_are_summed_by_their_weights(block) -> None:
    a, b, u, v = normal(9, 3), normal(11, 3, seed=1), normal(9, 2, seed=2), normal(11, 2, seed=3)
    assert_close(pair_sums(cubed, a, b, weights=(u, v)), torch.einsum("is,ij,js->s", u, cubed(a, b), v))
    assert_close(pair_sums(cubed, a, b), cubed(a, b).sum()[None])


def test_within_a_set_no_image_counts_beside_itself(block) -> None:
    a, u = normal(9, 3), normal(9, 2)
    pairs = cubed(a, a).fill_diagonal_(0)
    assert_close(pair_sums(cubed, a, weights=(u, u)), torch.einsum("is,ij,js->s", u, pairs, u))
    assert_close(pair_sums(cubed, a), pairs.sum()[None])


@pytest.mark.parametrize("num_subsets", [1, 40])
def test_subsets_taken_one_by_one_and_all_at_once_have_one_value(num_subsets: int) -> None:
    # One subset is fewer pairs than all images make, forty are more.
    a, b = normal(20, 5), normal(30, 5, seed=1) + 0.5
    generator = torch.Generator().manual_seed(0)
    rows, columns = (
        torch.stack([torch.randperm(count, generator=generator)[:size] for _ in range(num_subsets)])
        for count, size in ((20, 7), (30, 9))
    )
    expected = []
    for row, column in zip(rows, columns, strict=True):
        x, y = a[row] / 5**0.5, b[column] / 5**0.5
        within = (cubed(x, x).fill_diagonal_(0).sum() / (7 * 6), cubed(y, y).fill_diagonal_(0).sum() / (9 * 8))
        expected.append(sum(within) - 2 * cubed(x, y).mean())
    assert_close(polynomial_mmds(a, b, rows, columns), torch.stack(expected), rtol=1e-11, atol=1e-11)
