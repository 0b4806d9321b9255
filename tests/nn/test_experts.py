import pytest
import torch
import torch.nn.functional as F

from ldm.nn.experts import ExpertChoice
from ldm.nn.tokens import tokens_at, tokens_put


def made_one_by_one(layer: ExpertChoice, tokens: torch.Tensor) -> torch.Tensor:
    """The definition: expert after expert, token after token."""
    made = torch.zeros_like(tokens)
    num_taken = int(layer.capacity * tokens.shape[1] / len(layer.w1))
    for number, sample in enumerate(tokens):
        shares = F.softmax(sample @ layer.gate.weight.T, dim=-1)
        for expert, (first, second) in enumerate(zip(layer.w1, layer.w2, strict=True)):
            for place in sorted(range(len(sample)), key=lambda n: -shares[n, expert])[:num_taken]:
                made[number, place] += shares[place, expert] * (F.gelu(sample[place] @ first) @ second)
    return made


@pytest.mark.parametrize(("num_experts", "capacity", "num"), [(4, 2.0, 10), (3, 1.0, 7), (2, 2.0, 5), (8, 0.5, 16)])
def test_experts_give_what_their_definition_says_and_its_gradients(num_experts: int, capacity: float, num: int) -> None:
    torch.manual_seed(0)
    layer = ExpertChoice(6, 9, num_experts=num_experts, capacity=capacity).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(50)
    tokens = torch.randn(3, num, 6, dtype=torch.float64, requires_grad=True)
    inputs = [tokens, *layer.parameters()]

    expected, found = made_one_by_one(layer, tokens), layer(tokens)

    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_experts_that_take_every_token_are_a_mean_of_layers_weighted_by_shares() -> None:
    layer = ExpertChoice(6, 9, num_experts=2, capacity=2.0).double()
    tokens = torch.randn(1, 4, 6, dtype=torch.float64)
    shares = F.softmax(layer.gate(tokens), dim=-1)
    each = [F.gelu(tokens @ layer.w1[expert]) @ layer.w2[expert] for expert in range(2)]

    torch.testing.assert_close(layer(tokens), shares[..., :1] * each[0] + shares[..., 1:] * each[1])


def test_experts_give_nothing_for_a_token_that_none_takes() -> None:
    layer = ExpertChoice(6, 9, num_experts=2, capacity=0.5)
    tokens = torch.randn(2, 8, 6)

    taken = layer(tokens).abs().sum(-1) > 0

    assert ((taken.sum(1) >= 2) & (taken.sum(1) <= 4)).all(), "two experts took two of eight tokens each"


def test_tokens_that_are_taken_and_put_back_lie_where_they_were() -> None:
    tokens, places = torch.randn(2, 5, 3), torch.tensor([[4, 0, 2], [1, 3, 2]])

    back = tokens_put(tokens_at(tokens, places), places, num=5)

    is_there = torch.zeros(2, 5, dtype=torch.bool).scatter(1, places, True)
    torch.testing.assert_close(back, torch.where(is_there[..., None], tokens, 0), rtol=0, atol=0)


def test_tokens_put_at_one_place_add_up() -> None:
    tokens = torch.randn(1, 3, 2)

    there = tokens_put(tokens, torch.tensor([[1, 1, 0]]), num=2)

    torch.testing.assert_close(there, torch.stack([tokens[:, 2], tokens[:, 0] + tokens[:, 1]], dim=1))
