import pytest
import torch
from torch.testing import assert_close

from ldm.conditioners import TextTransformer, WordTokenizer

WORDS = ["a", "red", "seven", "on", "blue", "paper"]


def make(length: int = 8) -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(WordTokenizer(WORDS, length=length), width=16, depth=2, num_heads=2).double().eval()


def test_the_context_has_an_embedding_a_token_and_the_mask_of_the_tokenizer() -> None:
    captions = ["a red seven", "a blue paper on red"]
    conditioner = make()
    cond = conditioner({"caption": captions})
    assert cond.context is not None and cond.mask is not None
    assert cond.context.shape == (2, 8, 16)
    assert_close(cond.mask, conditioner.tokenizer(captions)[1])
    assert set(cond.parts()) == {"context", "mask"}


@pytest.mark.parametrize("training", [True, False])
def test_padding_does_not_change_the_embedding_of_real_tokens(training: bool) -> None:
    long, short = make(length=12).train(training), make(length=5).train(training)
    state = {**long.state_dict(), "position_embedding": long.position_embedding.detach()[:5]}
    short.load_state_dict(state)
    padded, bare = (conditioner({"caption": ["a red seven"]}).context for conditioner in (long, short))
    assert padded is not None and bare is not None
    assert_close(padded[:, :5], bare)


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


def test_a_width_that_does_not_divide_into_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^got conditioner\.width=10, expected a multiple of num_heads=4"):
        TextTransformer(WordTokenizer(WORDS), width=10, depth=1, num_heads=4)
