import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from ldm.metrics import CodebookUsage

NUM_RANKS = 2


def codes() -> torch.Tensor:
    return torch.randint(0, 40, (30, 4, 4), generator=torch.Generator().manual_seed(0))


def measured(*batches: torch.Tensor, num_codes: int = 64) -> tuple[float, float]:
    metric = CodebookUsage(num_codes)
    for batch in batches:
        metric.update(batch)
    usage, perplexity = metric.compute()
    return usage.item(), perplexity.item()


def test_even_use_of_some_entries_has_their_number_as_perplexity() -> None:
    assert measured(torch.arange(16).repeat(5).reshape(5, 4, 4)) == pytest.approx((16 / 64, 16))


def test_one_entry_alone_has_perplexity_one() -> None:
    assert measured(torch.full((2, 3, 3), 7)) == pytest.approx((1 / 64, 1))


def test_uneven_use_has_the_perplexity_of_its_entropy() -> None:
    """Shares of 3/4 and 1/4: exp(3/4 ln(4/3) + 1/4 ln 4) = 4 / 3^(3/4)."""
    assert measured(torch.tensor([0, 0, 0, 1]), num_codes=2) == pytest.approx((1.0, 4 / 3**0.75))


def test_batches_and_their_order_make_no_difference() -> None:
    whole = measured(codes())

    assert measured(*codes().flip(0).split(7)) == whole


def test_a_reset_metric_has_seen_nothing() -> None:
    metric = CodebookUsage(64)
    metric.update(codes())
    metric.reset()
    metric.update(torch.zeros(1, 2, 2, dtype=torch.int64))

    assert metric.compute()[1] == 1


@pytest.mark.parametrize("code", [-1, 4])
def test_codes_of_another_codebook_are_refused(code: int) -> None:
    with pytest.raises(ValueError, match=r"got codes from .* expected 0 to 3"):
        CodebookUsage(4).update(torch.tensor([0, code]))


def test_an_empty_codebook_is_refused() -> None:
    with pytest.raises(ValueError, match="got num_codes=0"):
        CodebookUsage(0)


def run_rank(rank: int, store: str, result: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_RANKS)
    try:
        # Unequal parts: an even share would hide a mean taken where a sum belongs.
        torch.save(torch.tensor(measured(codes()[:4] if rank == 0 else codes()[4:])), f"{result}{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_measure_what_one_does_on_every_rank(tmp_path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path / "store"), str(tmp_path / "result")), nprocs=NUM_RANKS)
    for rank in range(NUM_RANKS):
        assert_close(torch.load(tmp_path / f"result{rank}"), torch.tensor(measured(codes())), rtol=0, atol=0)
    assert math.isclose(measured(codes())[0], codes().unique().numel() / 64)
