import pytest
import torch

from ldm.metrics import CodebookUsage


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


def test_a_reset_metric_has_seen_nothing() -> None:
    metric = CodebookUsage(64)
    metric.update(torch.arange(30))
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
