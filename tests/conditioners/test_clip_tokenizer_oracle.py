"""Our CLIP tokenizer against that of transformers."""

import pytest
from clip_oracles import transformers_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.conditioners import CLIPTokenizer

SAME = [
    "",
    " ",
    "a cat",
    "A  Photo\tof\n a  CAT",
    "!!!",
    "hello...'s don't I'LL they're",
    "Größe 3 – naïve café 🙂👩‍👩‍👧",
    "word " * 200,
    "1234567890 3.14159 Ⅷ ½ ²",
    "日本語のテキスト 中文",
    "a_b-c/d\\e",
    "it's 5'9\" tall",
    "\u200bzero width a\u00a0b résumé—em dash…",
    "(x:1.3) [y] <cat-toy>",
    "שלום عربى हिन्दी",
]
# Cleaned as CLIP's training text was, which the tokenizer of transformers 5 leaves as it is.
CLEANED = {
    "“curly” ‘quotes’": "\"curly\" 'quotes'",
    "&lt;b&gt; &amp;amp; fish": "<b> & fish",
    "ｆｕｌｌ width": "full width",
    "ﬁ ligature": "fi ligature",
}


OURS = CLIPTokenizer(padding="end")


def our_ids(captions: list[str]) -> list[list[int]]:
    return OURS(captions)[0].tolist()


def test_ids_and_padding_are_those_of_transformers() -> None:
    assert our_ids(SAME) == transformers_ids(SAME).tolist()


def test_padding_with_zero_is_that_of_sd_2_and_sdxl() -> None:
    captions = [text for text in SAME if "!" not in text]
    assert CLIPTokenizer(padding="zero")(captions)[0].tolist() == transformers_ids(captions, pad_token="!").tolist()


def test_an_exclamation_mark_is_a_word_where_transformers_takes_it_for_padding() -> None:
    """With "!" as padding token, it reads each "!" of a prompt as padding, unlike what SD 2 was trained on."""
    zero = CLIPTokenizer(padding="zero")
    assert zero(["a cat!!!"])[0].tolist() != transformers_ids(["a cat!!!"], pad_token="!").tolist()
    assert zero.encode("a cat!!!") == transformers_ids(["a cat!!!"])[0, 1:4].tolist()


@pytest.mark.parametrize("text", CLEANED)
def test_text_that_needs_cleaning_differs_from_transformers_until_it_is_clean(text: str) -> None:
    (ours,) = our_ids([text])
    assert ours != transformers_ids([text])[0].tolist()
    assert ours == transformers_ids([CLEANED[text]])[0].tolist()


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="&<"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_ids_of_any_plain_english_are_those_of_transformers(text: str) -> None:
    """Without & and <, which may open an escape or the name of a special token."""
    assert our_ids([text]) == transformers_ids([text]).tolist()


def test_the_mask_ends_at_the_first_end_token_whatever_the_padding() -> None:
    captions = ["a cat", "", "word " * 200]
    end, zero = (CLIPTokenizer(padding=padding)(captions)[1] for padding in ("end", "zero"))  # type: ignore[arg-type]
    assert end.sum(1).tolist() == zero.sum(1).tolist() == [4, 2, 77]


def test_added_names_become_ids_of_their_own_whatever_their_case() -> None:
    tokenizer = CLIPTokenizer()
    tokenizer.add({"<Cat-Toy>": [49408], "sks": [49409, 49410]})
    plain = CLIPTokenizer()
    assert tokenizer.encode("a <cat-toy>, SKS!") == [
        *plain.encode("a"),
        49408,
        *plain.encode(","),
        49409,
        49410,
        *plain.encode("!"),
    ]
    assert tokenizer.encode("asks skss") == plain.encode("asks skss"), "only whole words"
    assert tokenizer.vocabulary_size == 49411


def test_the_longest_added_name_wins() -> None:
    tokenizer = CLIPTokenizer()
    tokenizer.add({"<a>": [49408], "<a>_1": [49409]})
    assert tokenizer.encode("<a>_1 <a>") == [49409, 49408]


@pytest.mark.parametrize("names", [{"": [1]}, {" ": [1]}, {"x": [1]}, {"Y": [1], "y": [2]}])
def test_names_that_cannot_be_told_apart_are_refused(names: dict[str, list[int]]) -> None:
    tokenizer = CLIPTokenizer()
    tokenizer.add({"X": [49408]})
    with pytest.raises(ValueError, match="expected names that are not empty, each once"):
        tokenizer.add(names)
