"""What CLIP and OpenCLIP encoders have in common: null conditions, prompts, added tokens, being frozen."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from clip_oracles import CAPTIONS, clip_text, open_clip_text, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ldm.conditioners import TextEncoder
from ldm.diffusion import Conditioning

Make = Callable[..., TextEncoder]
SIZE = (64, 64)


@pytest.fixture(params=[clip_text, open_clip_text], ids=["clip", "open_clip"])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param


def context(cond: Conditioning) -> Tensor:
    assert cond.context is not None
    return cond.context


def test_null_is_the_empty_caption_or_zeros(make: Make) -> None:
    empty, zeros = make(pooled=True), make(pooled=True, null="zeros")
    assert_close(empty.null(3).parts(), empty({"caption": [""] * 3}).parts())
    assert set(zeros.null(2).parts()) == set(zeros({"caption": ["x"]}).parts())
    assert [part.shape for part in zeros.null(2).parts().values()] == [
        part.shape for part in zeros({"caption": ["x", "y"]}).parts().values()
    ]
    assert all(bool((part == 0).all()) for part in zeros.null(2).parts().values())


@pytest.mark.parametrize("null", ["empty", "zeros"])
def test_plain_prompts_are_encoded_as_captions_bit_for_bit(make: Make, null: str) -> None:
    encoder = make(pooled=True, null=null)
    prompts = ["a red fox", "two dogs", r"\(x\)", "(y:1.0) z"]
    cond, uncond = encoder.prompt_pair(prompts, [""] * 4, image_size=SIZE)
    plain = encoder({"caption": ["a red fox", "two dogs", "(x)", "y z"]})
    assert_close(cond.parts(), plain.parts(), rtol=0, atol=0)
    assert_close(uncond.parts(), encoder.null(4).parts())


ENCODER = clip_text(pooled=True)


@given(st.text(st.characters(exclude_characters="()[]\\"), max_size=40).filter(lambda text: "BREAK" not in text))
@settings(max_examples=30, deadline=None)
def test_any_prompt_without_brackets_is_encoded_as_a_caption(prompt: str) -> None:
    cond, _ = ENCODER.prompt_pair([prompt], [""], image_size=SIZE)
    if len(ENCODER.tokenizer.encode(prompt)) <= 75:
        assert_close(cond.parts(), ENCODER({"caption": [prompt]}).parts(), rtol=0, atol=0)


def test_captions_are_never_parsed(make: Make) -> None:
    encoder = make()
    ids, _ = encoder.tokenizer(["a (red:1.5) fox"])
    assert_close(encoder({"caption": ["a (red:1.5) fox"]}).parts(), encoder.encode_ids(ids).parts())
    assert len(ids[0].unique()) > len(encoder.tokenizer(["a red fox"])[0].unique())


def test_a_weight_scales_its_tokens_and_keeps_the_mean(make: Make) -> None:
    encoder = make(pooled=True)
    weighted, _ = encoder.prompt_pair(["a (red:1.5) fox"], [""], image_size=SIZE)
    plain = encoder({"caption": ["a red fox"]})
    ratio = context(weighted) / context(plain)
    assert_close(ratio[0, 2] / ratio[0, 1], torch.full((encoder.context_dim,), 1.5))
    others = torch.cat([ratio[0, :2], ratio[0, 3:]])
    assert_close(others, others[:1, :1].expand_as(others))
    assert_close(context(weighted).mean(), context(plain).mean())
    assert_close(weighted.vector, plain.vector)


def test_a_long_prompt_is_read_in_chunks_each_with_start_and_end(make: Make) -> None:
    encoder = make(pooled=True)
    words = [f"{a}{b}" for a in "abcdefghij" for b in "0123456789"]
    tokens = encoder.tokenizer.encode(" ".join(words))
    assert 150 < len(tokens) <= 225
    cond, uncond = encoder.prompt_pair([" ".join(words), "short"], ["", "bad"], image_size=SIZE)
    assert context(cond).shape == context(uncond).shape == (2, 3 * 77, encoder.context_dim)
    chunks = [encoder.tokenizer.frame(tokens[i : i + 75]) for i in (0, 75, 150)]
    encoded = encoder.encode_ids(torch.stack(chunks))
    assert_close(context(cond)[0], context(encoded).flatten(0, 1))
    assert encoded.vector is not None and cond.vector is not None
    assert_close(cond.vector[0], encoded.vector[0])
    short, empty = (context(encoder({"caption": [text]}))[0] for text in ("short", ""))
    assert_close(context(cond)[1], torch.cat([short, empty, empty]))


def test_a_long_negative_lengthens_the_prompt_too(make: Make) -> None:
    cond, uncond = make().prompt_pair(["x"], ["bad " * 80], image_size=SIZE)
    assert context(cond).shape == context(uncond).shape
    assert context(cond).shape[1] == 154


def test_chunks_are_counted_after_the_cut_without_encoding(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make(max_chunks=3)
    texts = ["", "a (fox:1.2)", "word " * 76, "a BREAK b", "word " * 999]
    lengths = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for text in texts:
            lengths.append(context(encoder.prompt_pair([text], [""], image_size=SIZE)[0]).shape[1])
    assert lengths == [77, 77, 154, 154, 231]
    # Neither does it warn, as whoever encodes the prompt will.
    monkeypatch.setattr(encoder, "encode_ids", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [77 * encoder.num_chunks(text) for text in texts] == lengths


def test_an_empty_negative_is_null_beside_one_that_is_not(make: Make) -> None:
    """What a picture is led away from is its own affair, not that of its batch."""
    encoder = make(pooled=True, null="zeros")
    _, uncond = encoder.prompt_pair(["x", "x", "x"], ["", "bad", " "], image_size=SIZE)
    _, alone = encoder.prompt_pair(["x"], ["bad"], image_size=SIZE)
    zeros = encoder.null(1)
    for name, part in uncond.parts().items():
        assert_close(part[0:1], getattr(zeros, name))
        assert_close(part[1:2], getattr(alone, name))
        assert_close(part[2:3], getattr(zeros, name))


def test_more_chunks_than_allowed_are_cut_with_a_warning(make: Make) -> None:
    encoder = make(max_chunks=1)
    with pytest.warns(UserWarning, match=r"cut the last 5 tokens of the prompt 'word .*\[\.\.\.\]'; .*max_chunks=1"):
        cond, _ = encoder.prompt_pair(["word " * 80], [""], image_size=SIZE)
    assert_close(cond.parts(), encoder({"caption": ["word " * 80]}).parts())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.prompt_pair(["word " * 75], [""], image_size=SIZE)


@pytest.mark.parametrize("per_name", [1, 2])
def test_added_tokens_are_encoded_by_their_vectors(make: Make, per_name: int) -> None:
    """The vectors of known words, under new names, give those words' encoding; captions without them stay."""
    encoder = make(pooled=True)
    ids = encoder.tokenizer.encode("red fox")
    vectors = encoder.token_embedding.weight[ids].detach()
    before = encoder({"caption": CAPTIONS}).parts()
    expected = encoder({"caption": ["a red fox runs"]}).parts()
    names = ["<one>", "<Two>"][: 2 // per_name]
    new = encoder.add_tokens(names, vectors.unflatten(0, (-1, per_name)) if per_name > 1 else vectors)
    assert new == [49408, 49409] and encoder.token_embedding.num_embeddings == 49410
    caption = "a <one> <two> runs" if per_name == 1 else "a <one> runs"
    assert_close(encoder({"caption": [caption]}).parts(), expected)
    assert_close(encoder({"caption": CAPTIONS}).parts(), before)
    assert not encoder.token_embedding.weight.requires_grad


def test_added_tokens_can_be_learned(make: Make) -> None:
    encoder = make(pooled=True)
    encoder.add_tokens(["<new>"], torch.randn(1, 32))
    encoder.token_embedding.weight.requires_grad_(True)
    cond = encoder({"caption": ["a <new> thing"]})
    assert cond.vector is not None
    (context(cond).square().sum() + cond.vector.square().sum()).backward()
    gradient = encoder.token_embedding.weight.grad
    assert gradient is not None and gradient[49408].abs().min() > 0


def test_tokens_are_added_again_and_again(make: Make) -> None:
    encoder = make()
    assert encoder.add_tokens(["<a>"], torch.ones(1, 32)) == [49408]
    assert encoder.add_tokens(["<b>", "<c>"], torch.zeros(2, 32)) == [49409, 49410]
    assert_close(encoder.token_embedding.weight[49408:], torch.tensor([1.0, 0, 0])[:, None].expand(3, 32))


@pytest.mark.parametrize("shape", [(1, 16), (2, 32), (32,), (1, 2, 16)])
def test_vectors_of_another_encoder_are_refused(make: Make, shape: tuple[int, ...]) -> None:
    encoder = make()
    with pytest.raises(ValueError, match=r"got 1 names and vectors .*expected \(1, 32\)"):
        encoder.add_tokens(["<a>"], torch.zeros(shape))
    assert encoder.tokenizer.added == {}


def test_it_stays_frozen_inside_what_is_trained(make: Make) -> None:
    encoder = make()
    torch.nn.ModuleDict({"conditioner": encoder}).train()
    assert not any(module.training for module in encoder.modules())
    assert encoder.is_frozen and not any(p.requires_grad for p in encoder.parameters())


def test_a_copy_encodes_alike(make: Make) -> None:
    encoder = make(pooled=True)
    encoder.add_tokens(["<a>"], torch.ones(1, 32))
    again = copy.deepcopy(encoder)
    assert_close(again({"caption": ["a <a>"]}).parts(), encoder({"caption": ["a <a>"]}).parts())
    again.load_state_dict(encoder.state_dict())
    randomized(again, seed=3)
    assert (context(again({"caption": ["a"]})) - context(encoder({"caption": ["a"]}))).abs().max() > 0.01
