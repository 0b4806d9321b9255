"""A step that is left out changes nothing, whichever optimizer and precision."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.training.callbacks.left_out import leave_out, unscaled_norm

OPTIMIZERS = {
    "fused AdamW": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "fused Adam": partial(torch.optim.Adam, lr=0.1, weight_decay=0.1, fused=True),
    "fused SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.1),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.1),
}
KEPT, LEFT_OUT = torch.tensor(False), torch.tensor(True)

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def state(layer: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    tensors = [value for slots in optimizer.state.values() for value in slots.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in (*layer.parameters(), *tensors)]


def step(layer: nn.Module, optimizer: torch.optim.Optimizer, *, factor: float, rejected: Tensor | None) -> None:
    optimizer.zero_grad()
    (factor * layer(torch.ones(2, 3))).square().mean().backward()
    if rejected is not None:
        leave_out(optimizer, rejected, scaler=None)
    optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("factor", [2.0, float("nan")])
def test_a_step_left_out_changes_neither_weights_nor_moments_nor_counts(make: Make, factor: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = make(list(layer.parameters()))
    step(layer, optimizer, factor=1.0, rejected=KEPT)
    before = state(layer, optimizer)
    step(layer, optimizer, factor=factor, rejected=LEFT_OUT)
    assert_close(state(layer, optimizer), before, rtol=0, atol=0)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_that_is_kept_is_the_same_bit_for_bit(make: Make) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(3, 2)
    watched = copy.deepcopy(plain)
    first, second = make(list(plain.parameters())), make(list(watched.parameters()))
    for factor in (1.0, 3.0, 0.5):
        step(plain, first, factor=factor, rejected=None)
        step(watched, second, factor=factor, rejected=KEPT)
    assert_close(state(watched, second), state(plain, first), rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_with_loss_scaling_a_step_is_left_out_too_and_the_norm_is_unscaled(fused: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for rejected in (KEPT, LEFT_OUT, KEPT):
        optimizer.zero_grad()
        loss = layer(torch.ones(2, 3)).square().mean()
        expected = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, layer.parameters())]).norm()
        scaler.scale(layer(torch.ones(2, 3)).square().mean()).backward()
        if not fused:
            scaler.unscale_(optimizer)
        assert_close(unscaled_norm(optimizer, like=expected, scaler=scaler), expected)
        before = state(layer, optimizer)[:2]
        leave_out(optimizer, rejected, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(state(layer, optimizer)[0], before[0]) == bool(rejected)


def test_an_optimizer_without_gradients_has_the_norm_zero() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    assert unscaled_norm(optimizer, like=torch.zeros(()), scaler=None) == 0
