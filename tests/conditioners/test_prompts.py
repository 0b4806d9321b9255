"""Prompt weights and chunks."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from ldm.conditioners.prompts import Chunk, chunk_prompt, parse_prompt, weigh

BRACKETS = r"()[]\\"


def letters(text: str) -> list[int]:
    """A tokenizer: an id a letter, none for a space."""
    return [ord(letter) for letter in text if letter != " "]


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("", [("", 1.0)]),
        ("a (red) cat", [("a ", 1.0), ("red", 1.1), (" cat", 1.0)]),
        ("a [red] cat", [("a ", 1.0), ("red", 1 / 1.1), (" cat", 1.0)]),
        ("a (red:1.3) cat", [("a ", 1.0), ("red", 1.3), (" cat", 1.0)]),
        ("(red: .5 )", [("red", 0.5)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(a (red:2) cat:0.5)", [("a ", 0.5), ("red", 1.0), (" cat", 0.5)]),
        ("([red])", [("red", (1 / 1.1) * 1.1)]),
        ("(red:1)", [("red", 1.0)]),
        ("(red:-1)", [("red", -1.0)]),
        (r"a \(red\) \[cat\] \\", [("a (red) [cat] \\", 1.0)]),
        (r"(a \(red\):1.5)", [("a (red)", 1.5)]),
        ("ratio 16:9, 3:2)", [("ratio 16:9, 3:2)", 1.0)]),
        ("[red:1.3]", [("red:1.3", 1 / 1.1)]),
        ("a ) b ] c", [("a ) b ] c", 1.0)]),
        ("a (red cat", [("a ", 1.0), ("red cat", 1.1)]),
        ("()", [("", 1.0)]),
    ],
)
def test_brackets_weigh_as_in_the_web_interfaces(prompt: str, pieces: list[tuple[str, float]]) -> None:
    assert [tuple(piece) for piece in parse_prompt(prompt)] == pieces


@given(st.text(alphabet=st.one_of(st.sampled_from("()[]\\:.-+123a BREAK"), st.characters())))
def test_any_text_is_a_prompt(prompt: str) -> None:
    pieces = parse_prompt(prompt)
    assert pieces and all(math.isfinite(weight) for _, weight in pieces)
    assert all(a.weight != b.weight for a, b in itertools.pairwise(pieces))
    kept = iter(prompt)
    assert all(letter in kept for piece in pieces for letter in piece.text), "no letter is new or out of order"


@given(st.text(alphabet=st.characters(exclude_characters=BRACKETS)))
def test_text_without_brackets_is_itself_with_weight_1(prompt: str) -> None:
    assert parse_prompt(prompt) == [(prompt, 1.0)]


@given(st.text())
def test_escaping_makes_any_text_plain(prompt: str) -> None:
    escaped = "".join(f"\\{letter}" if letter in BRACKETS else letter for letter in prompt)
    assert parse_prompt(escaped) == [(prompt, 1.0)]


@given(st.text(alphabet="ab (:1.5)[]"), st.integers(1, 5))
def test_chunks_hold_the_tokens_in_order_and_none_too_many(prompt: str, size: int) -> None:
    chunks = chunk_prompt(prompt, letters, size=size)
    assert [i for chunk in chunks for i in chunk.ids] == [
        i for piece in parse_prompt(prompt) for i in letters(piece[0])
    ]
    assert all(len(chunk.ids) == len(chunk.weights) for chunk in chunks)
    assert all(len(chunk.ids) == size for chunk in chunks[:-1])
    assert len(chunks[-1].ids) <= size and (len(chunks) == 1 or chunks[-1].ids)


def test_tokens_carry_the_weight_of_their_bracket_across_chunks() -> None:
    assert chunk_prompt("a(bc:2)d", letters, size=2) == [
        Chunk([ord("a"), ord("b")], [1.0, 2.0]),
        Chunk([ord("c"), ord("d")], [2.0, 1.0]),
    ]


def test_break_starts_a_chunk() -> None:
    assert [chunk.ids for chunk in chunk_prompt("ab BREAK (c BREAK d)", letters, size=9)] == [
        letters("ab"),
        letters("c"),
        letters("d"),
    ]
    assert len(chunk_prompt("BREAK a BREAK BREAK b BREAK", letters, size=9)) == 2
    assert len(chunk_prompt("BREAKFAST break", letters, size=99)) == 1


def test_weights_multiply_and_the_mean_of_each_chunk_comes_back() -> None:
    torch.manual_seed(0)
    context, weights = torch.randn(3, 5, 4) + 0.3, torch.tensor([[1.0, 1.5, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 2, 1]])
    weighed = weigh(context, weights)
    assert_close(weighed.mean((1, 2)), context.mean((1, 2)))
    product = context * weights[..., None]
    ratio = weighed / product
    assert_close(ratio[0], ratio[0, :1, :1].expand(5, 4))
    assert torch.equal(weighed[1], context[1])
    assert_close(weighed[2, 1:3], torch.zeros(2, 4))


def test_a_mean_of_zero_is_nothing_to_restore() -> None:
    """Layer norms without a bias give states of mean zero; dividing by their rounding error would be noise."""
    context = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])
    weights = torch.tensor([[1.0, 1.5]])
    assert_close(weigh(context, weights), torch.tensor([[[1.0, -1.0], [3.0, -3.0]]]))


def test_a_weight_that_turns_the_mean_around_does_not_turn_the_embedding() -> None:
    context = torch.tensor([[[1.0, 1.0], [0.5, 0.5]]])
    weighed = weigh(context, torch.tensor([[1.0, -5.0]]))
    assert_close(weighed, torch.tensor([[[1.0, 1.0], [-2.5, -2.5]]]))
