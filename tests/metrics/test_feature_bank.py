import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_helpers import Pixels, images
from torch.testing import assert_close

from ldm.metrics import CLIPDiscrepancy
from ldm.metrics.feature_bank import hashed


def bank(count: int, *, max_images: int, batch_size: int = 100, order: torch.Tensor | None = None) -> CLIPDiscrepancy:
    metric = CLIPDiscrepancy(Pixels(), max_images=max_images)
    pictures = images(count)
    for places in (torch.arange(count) if order is None else order).split(batch_size):
        metric.update(pictures[places], places, real=True)
    return metric


@given(st.integers(0, 2**31), st.integers(-(2**40), 2**40))
@settings(max_examples=30, deadline=None)
def test_no_two_numbers_share_a_hash(seed: int, start: int) -> None:
    numbers = torch.arange(start, start + 500)
    assert len(hashed(numbers, seed).unique()) == 500


def test_the_hash_is_even_over_its_range() -> None:
    shares = torch.histc(hashed(torch.arange(8000), 0).double(), bins=8, min=-(2.0**63), max=2.0**63)
    # Five standard deviations of a binomial count.
    assert (shares - 1000).abs().max() < 5 * (8000 / 8 * 7 / 8) ** 0.5


def test_seeds_keep_different_images() -> None:
    orders = {tuple(hashed(torch.arange(50), seed).argsort().tolist()) for seed in range(20)}
    assert len(orders) == 20


@given(st.integers(1, 90), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_what_stays_depends_on_neither_batch_size_nor_order(batch_size: int, seed: int) -> None:
    order = torch.randperm(90, generator=torch.Generator().manual_seed(seed))
    kept = bank(90, max_images=10, batch_size=batch_size, order=order).kept("real")
    assert_close(kept, bank(90, max_images=10).kept("real"), rtol=0, atol=0)


def test_no_more_is_held_than_twice_the_limit_and_a_batch() -> None:
    metric = bank(100, max_images=10, batch_size=5)
    assert sum(map(len, metric.real_features)) <= 2 * 10 + 5
    assert len(metric.kept("real")) == 10


def test_batches_are_joined_to_blocks_without_a_change(monkeypatch) -> None:
    expected = bank(95, max_images=90).kept("real")
    monkeypatch.setattr("ldm.metrics.feature_bank.BLOCK", 20)
    metric = bank(95, max_images=90, batch_size=7)
    assert [len(part) for part in metric.real_features] == [21, 21, 21, 21, 7, 4]
    assert [len(part) for part in metric.real_numbers] == [21, 21, 21, 21, 7, 4]
    assert_close(metric.kept("real"), expected, rtol=0, atol=0)


def test_images_below_the_limit_all_stay() -> None:
    kept = bank(30, max_images=50).kept("real")
    everything = Pixels()(((images(30) + 1) * 127.5).round() / 127.5 - 1).float()
    assert_close(kept.sort(dim=0).values, everything.sort(dim=0).values)


def test_a_number_given_twice_is_refused() -> None:
    metric = CLIPDiscrepancy(Pixels())
    for _ in range(2):
        metric.update(images(5), torch.arange(5), real=False)
    with pytest.raises(ValueError, match="got generated image number 0 more than once"):
        metric.kept("generated")


def test_a_bank_for_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match="got max_images=1"):
        CLIPDiscrepancy(Pixels(), max_images=1)
