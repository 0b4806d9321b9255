import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.training.randomness import draw, generator_for, normal

SHAPE = (2, 4, 4)


def positions(start: int, count: int) -> Tensor:
    return torch.arange(start, start + count)


def test_a_sample_draws_the_same_alone_and_in_any_batch() -> None:
    whole = draw(3, positions(100, 8), SHAPE)
    halves = [draw(3, positions(100, 4), SHAPE), draw(3, positions(104, 4), SHAPE)]
    for name in ("eps", "posterior", "u", "drop"):
        joined = torch.cat([getattr(half, name) for half in halves])
        assert_close(joined, getattr(whole, name), rtol=0, atol=0)
    assert_close(torch.cat([normal(3, positions(p, 1), SHAPE) for p in range(5)]), normal(3, positions(0, 5), SHAPE))


def test_positions_and_seeds_draw_apart() -> None:
    first, other_seed = draw(0, positions(0, 400), SHAPE), draw(1, positions(0, 400), SHAPE)
    for name in ("eps", "posterior"):
        here, there = getattr(first, name), getattr(other_seed, name)
        rows = torch.stack([here[:-1].flatten(), here[1:].flatten(), there[1:].flatten()])
        assert (torch.corrcoef(rows) - torch.eye(3)).abs().max() < 0.05
    assert abs(torch.corrcoef(torch.stack([first.eps.flatten(), first.posterior.flatten()]))[0, 1].item()) < 0.05
    assert (first.u - other_seed.u).abs().min() > 1e-3


def test_noise_is_standard_normal_and_dropout_uniform() -> None:
    drawn = draw(0, positions(0, 2000), SHAPE)
    for noise in (drawn.eps, drawn.posterior, normal(0, positions(0, 2000), SHAPE)):
        assert_close(torch.stack([noise.mean(), noise.std()]), torch.tensor([0.0, 1.0]), rtol=0, atol=0.02)
    quantiles = torch.quantile(drawn.drop, torch.tensor([0.1, 0.5, 0.9]))
    assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9]), rtol=0, atol=0.04)
    assert drawn.drop.min() >= 0 and drawn.drop.max() < 1


@pytest.mark.parametrize("start", [0, 17, 12_345, 10**8])
@pytest.mark.parametrize("size", [16, 128, 1000])
def test_times_cover_every_run_of_consecutive_positions_evenly(start: int, size: int) -> None:
    """Each of B strata is hit about once, and no interval is off by more than a few samples: random draws fail both."""
    for seed in range(3):
        u = draw(seed, positions(start, size), (1, 1, 1)).u.double()
        counts = torch.bincount((u * size).floor().long(), minlength=size)
        assert counts.max() <= 3
        assert (counts == 0).sum() <= 0.3 * size
        ranks = torch.arange(1, size + 1, dtype=torch.float64)
        u = u.sort().values
        discrepancy = torch.maximum((ranks - size * u).max(), (size * u - ranks + 1).max())
        assert discrepancy < 3.0


def test_times_lie_strictly_between_zero_and_one() -> None:
    u = draw(0, positions(0, 20_000), (1, 1, 1)).u
    assert u.dtype == torch.float32 and u.min() > 0 and u.max() < 1


def test_the_time_says_nothing_of_the_dropout() -> None:
    drawn = draw(0, positions(0, 4000), (1, 1, 1))
    assert abs(torch.corrcoef(torch.stack([drawn.u, drawn.drop]))[0, 1].item()) < 0.05


def test_generators_do_not_depend_on_the_global_state() -> None:
    torch.manual_seed(0)
    first = torch.rand(3, generator=generator_for(1, 2))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert_close(torch.rand(3, generator=generator_for(1, 2)), first, rtol=0, atol=0)
    torch.manual_seed(0)
    draw(0, positions(0, 4), SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
