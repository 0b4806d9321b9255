import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ldm.training.ema import EMA
from ldm.training.frozen import freeze


def make_trained() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"net": nn.Linear(3, 2), "encoder": freeze(nn.Linear(4, 4))}).double()


def set_to(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)


def test_the_average_of_a_step_follows_the_closed_form_of_the_rising_decay() -> None:
    """What n updates leave of the start, the product of (1 + k) / (10 + k), is 1 / binomial(n + 9, 9)."""
    trained = make_trained()
    set_to(trained, 3.0)
    ema = EMA(trained, decay=0.9999)
    set_to(trained, 5.0)
    for n in range(40):
        ema.update(trained, num_updates=n)
        expected = 5.0 - 2.0 / math.comb(n + 10, 9)
        assert_close(ema.module["net"].weight, torch.full((2, 3), expected, dtype=torch.float64))


def test_past_its_rise_the_average_is_exponential() -> None:
    trained = make_trained()
    set_to(trained, 0.0)
    ema = EMA(trained, decay=0.9)
    set_to(trained, 1.0)
    for n in range(1000, 1020):
        ema.update(trained, num_updates=n)
    assert_close(ema.module["net"].bias, torch.full((2,), 1 - 0.9**20, dtype=torch.float64))


def test_frozen_parameters_are_shared_and_trained_ones_are_not() -> None:
    trained = make_trained()
    ema = EMA(trained, decay=0.9)
    assert ema.module["encoder"].weight is trained["encoder"].weight
    assert ema.module["net"].weight is not trained["net"].weight
    assert ema.module["net"].weight.data_ptr() != trained["net"].weight.data_ptr()


def test_an_update_leaves_the_trained_and_the_frozen_alone() -> None:
    trained = make_trained()
    ema = EMA(trained, decay=0.0)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    ema.update(trained, num_updates=3)
    assert_close(dict(trained.state_dict()), before, rtol=0, atol=0)


def test_decay_zero_is_a_copy() -> None:
    trained = make_trained()
    ema = EMA(trained, decay=0.0)
    set_to(trained, 0.25)
    ema.update(trained, num_updates=100)
    assert_close(dict(ema.module.state_dict()), dict(trained.state_dict()), rtol=0, atol=0)


def test_buffers_are_those_of_the_last_update() -> None:
    trained = nn.Sequential(nn.BatchNorm1d(3))
    ema = EMA(trained, decay=0.9)
    trained(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) + 4)
    ema.update(trained, num_updates=0)
    assert_close(ema.module[0].running_mean, trained[0].running_mean, rtol=0, atol=0)
    assert trained[0].running_mean.abs().min() > 0.1


def test_names_are_those_of_the_trained_behind_one_prefix() -> None:
    trained = make_trained()
    assert set(EMA(trained, decay=0.9).state_dict()) == {f"module.{name}" for name in trained.state_dict()}


def test_the_average_needs_no_gradient_and_stays_in_evaluation_mode() -> None:
    ema = EMA(make_trained(), decay=0.9)
    ema.train()
    assert not any(module.training for module in ema.module.modules())
    assert not any(parameter.requires_grad for parameter in ema.parameters())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_never_or_wrongly_averages_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"^got ema_decay={decay}, expected"):
        EMA(make_trained(), decay=decay)
