from typing import Any, Literal

import pytest
import torch
from torch.testing import assert_close

from ldm.conditioners import TextTransformer, WordTokenizer

Pooling = Literal["none", "sum"]
WORDS = ["a", "red", "seven", "on", "blue", "paper"]


def make(length: int = 8, pooling: Pooling = "sum") -> TextTransformer:
    torch.manual_seed(0)
    tokenizer = WordTokenizer(WORDS, length=length)
    return TextTransformer(tokenizer, width=16, depth=2, num_heads=2, pooling=pooling).double().eval()


def test_the_context_has_an_embedding_a_token_and_the_mask_of_the_tokenizer() -> None:
    captions = ["a red seven", "a blue paper on red"]
    conditioner = make()
    cond = conditioner({"caption": captions})
    assert cond.context is not None and cond.mask is not None
    assert cond.context.shape == (2, 8, 16)
    assert_close(cond.mask, conditioner.tokenizer(captions)[1])


@pytest.mark.parametrize(("pooling", "parts"), [("none", {"context", "mask"}), ("sum", {"context", "mask", "vector"})])
def test_pooling_decides_whether_there_is_a_vector(pooling: Pooling, parts: set[str]) -> None:
    conditioner = make(pooling=pooling)
    assert set(conditioner({"caption": ["red"]}).parts()) == set(conditioner.null(1).parts()) == parts


def test_the_vector_is_the_sum_over_real_tokens() -> None:
    cond = make()({"caption": ["a red seven", ""]})
    assert cond.context is not None
    assert_close(cond.vector, torch.stack([cond.context[0, :5].sum(0), cond.context[1, :2].sum(0)]))


@pytest.mark.parametrize("training", [True, False])
def test_padding_does_not_change_the_embedding_of_real_tokens(training: bool) -> None:
    long, short = make(length=12).train(training), make(length=5).train(training)
    state = {**long.state_dict(), "position_embedding": long.position_embedding.detach()[:5]}
    short.load_state_dict(state)
    padded, bare = (conditioner({"caption": ["a red seven"]}) for conditioner in (long, short))
    assert padded.context is not None
    assert_close((padded.context[:, :5], padded.vector), (bare.context, bare.vector))


def test_a_caption_is_embedded_the_same_whatever_else_is_in_the_batch() -> None:
    conditioner = make()
    alone = conditioner({"caption": ["a red seven"]})
    together = conditioner({"caption": ["blue", "a red seven", ""]})[1:2]
    assert_close(together.parts(), alone.parts())


def test_null_is_the_empty_caption() -> None:
    conditioner = make()
    assert_close(conditioner.null(3).parts(), conditioner({"caption": [""] * 3}).parts())


def test_different_captions_differ_and_word_order_matters() -> None:
    conditioner = make()
    context = conditioner({"caption": ["red on blue", "blue on red", ""]}).context
    assert context is not None
    assert torch.cdist(context.flatten(1), context.flatten(1))[~torch.eye(3, dtype=torch.bool)].min() > 0.1


def test_a_caption_and_null_together_give_every_parameter_a_gradient() -> None:
    conditioner = make().train()
    context = conditioner({"caption": ["a red seven"]}).context
    null = conditioner.null(1).context
    assert context is not None and null is not None
    (context.square() + 2 * null.square()).mul(torch.linspace(1, 2, 16)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in conditioner.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 10}, r"^got conditioner\.width=10, expected a multiple of num_heads=4"),
        ({"pooling": "mean"}, r"^got conditioner\.pooling=mean, expected none or sum"),
    ],
    ids=["width", "pooling"],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextTransformer(WordTokenizer(WORDS), **({"width": 8, "depth": 1, "num_heads": 4} | options))
