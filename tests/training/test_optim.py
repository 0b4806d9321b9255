import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ldm.training.optim import constant, cosine, cosine_steps, inverse_sqrt, linear_steps


def rates(make: Callable[[Optimizer], LRScheduler], num_steps: int, lr: float = 2.0) -> list[float]:
    """The learning rate that each step uses."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=lr)
    schedule, used = make(optimizer), []
    for _ in range(num_steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return used


def test_constant_rises_in_a_line_and_stays() -> None:
    assert rates(lambda o: constant(o, num_warmup_steps=4), 7) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0])
    assert rates(constant, 3) == [2.0, 2.0, 2.0]


def test_cosine_falls_by_half_a_cosine_from_the_rate_to_its_share() -> None:
    found = rates(lambda o: cosine(o, num_steps=10, final_factor=0.1), 13)
    expected = [0.2 + 1.8 * (1 + math.cos(math.pi * min(i, 10) / 10)) / 2 for i in range(13)]
    assert found == pytest.approx(expected)


def test_cosine_warms_up_first_and_reaches_its_peak_there() -> None:
    found = rates(lambda o: cosine(o, num_steps=12, num_warmup_steps=4), 13)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert max(found) == found[4] == 2.0
    assert all(later < earlier for earlier, later in pairwise(found[4:]))
    assert found[12] == pytest.approx(0.0)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_a_run_shorter_than_its_warm_up_starts_at_the_full_rate(num_steps: int) -> None:
    found = rates(lambda o: cosine(o, num_steps=num_steps, num_warmup_steps=100), num_steps)
    assert found[0] == 2.0 and found[-1] > 0


@pytest.mark.parametrize("falls", [cosine, partial(linear_steps, final_factor=0.1), cosine_steps])
def test_a_rate_that_falls_to_the_end_is_refused_where_training_has_none(falls: Callable[..., LRScheduler]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=r"lr_schedule\.num_steps: got -1, .* set trainer\.max_steps"):
        falls(optimizer, num_steps=-1, num_warmup_steps=100)


def test_inverse_sqrt_is_constant_and_then_falls_with_the_root_of_the_steps() -> None:
    """Karras et al. 2024, eq. 67: alpha_ref / sqrt(max(t / t_ref, 1)), after their linear ramp."""
    found = rates(lambda o: inverse_sqrt(o, num_constant_steps=4, num_warmup_steps=2), 17)
    assert found[:5] == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0])
    assert (found[8], found[16]) == pytest.approx((2 / 2**0.5, 1.0))
    with pytest.raises(ValueError, match=r"^got lr_schedule\.num_constant_steps=0"):
        rates(lambda o: inverse_sqrt(o, num_constant_steps=0), 1)
