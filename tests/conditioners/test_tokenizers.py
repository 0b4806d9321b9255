import copy
import warnings

import open_clip
import pytest
import torch
from torch.testing import assert_close

from ldm.conditioners import CLIPTokenizer, WordTokenizer

WORDS = ["a", "red", "seven", "on", "blue", "paper", ","]
CAPTIONS = ["a red handwritten seven on a blue background", "", "!; so", "Größe 3 – naïve café 🙂", "word " * 200]


@pytest.fixture(scope="module")
def clip() -> CLIPTokenizer:
    return CLIPTokenizer()


def test_each_word_is_one_token_between_start_and_end() -> None:
    ids, mask = WordTokenizer(WORDS, length=8)(["a red seven", ""])
    pad, _, start, end = range(4)
    a, red, seven = (4 + WORDS.index(word) for word in ("a", "red", "seven"))
    assert ids.tolist() == [[start, a, red, seven, end, pad, pad, pad], [start, end, *[pad] * 6]]
    assert mask.sum(1).tolist() == [5, 2]


def test_the_mask_covers_start_to_end_and_no_padding() -> None:
    tokenizer = WordTokenizer(WORDS, length=9)
    ids, mask = tokenizer(["red", "a red seven on a blue paper", ""])
    assert ids.shape == mask.shape == (3, 9) and mask.dtype == torch.bool
    assert_close(mask, ids != tokenizer.SPECIAL.index("[PAD]"))


def test_case_and_punctuation_are_no_part_of_words() -> None:
    tokenizer = WordTokenizer(WORDS, length=8)
    assert_close(tokenizer(["A RED, seven"]), tokenizer(["a red , seven"]))


def test_a_long_caption_is_cut_and_still_ends() -> None:
    tokenizer = WordTokenizer(WORDS, length=5)
    ids, mask = tokenizer(["a red seven on a blue paper"])
    assert ids[0, -1] == tokenizer.SPECIAL.index("[END]")
    assert bool(mask.all())


def test_unknown_words_become_one_token_and_are_named_as_typed() -> None:
    tokenizer = WordTokenizer(WORDS, length=8)
    with pytest.warns(UserWarning, match=r"never seen: Purple, zwölf$"):
        ids, _ = tokenizer(["a Purple seven", "a zwölf"])
    unknown = tokenizer.SPECIAL.index("[UNK]")
    assert (ids == unknown).sum(1).tolist() == [1, 1]


def test_known_words_pass_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WordTokenizer(WORDS)(["a red seven"])


@pytest.mark.parametrize("words", [["a", "a"], ["red", "[PAD]"], ["Red"]], ids=["twice", "special", "capital"])
def test_words_that_no_caption_could_reach_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^got .*vocabulary.*expected"):
        WordTokenizer(words)


def test_clip_ids_are_those_of_open_clip(clip: CLIPTokenizer) -> None:
    assert_close(clip(CAPTIONS)[0], open_clip.tokenize(CAPTIONS).long())
    assert (clip.vocabulary_size, clip.length) == (49408, 77)


def test_clip_masks_start_to_end_although_padding_and_exclamation_mark_share_an_id(clip: CLIPTokenizer) -> None:
    ids, mask = clip(CAPTIONS)
    end = 49407
    for row, kept in zip(ids.tolist(), mask, strict=True):
        assert kept.tolist() == [i <= row.index(end) for i in range(77)]
    assert ids[2, 1] == ids[2, -1] == 0 and mask[2, 1] and not mask[2, -1]


def test_a_shorter_length_cuts_clip_captions_and_still_ends(clip: CLIPTokenizer) -> None:
    short = CLIPTokenizer(length=16)
    ids, mask = short(["word " * 200])
    assert ids.shape == (1, 16) and ids[0, -1] == 49407 and bool(mask.all())


@pytest.mark.parametrize("make", [lambda: WordTokenizer(WORDS), CLIPTokenizer], ids=["words", "clip"])
def test_a_copy_tokenizes_alike(make: type[CLIPTokenizer]) -> None:
    """The moving average deep-copies the conditioner and its tokenizer."""
    tokenizer = make()
    assert_close(copy.deepcopy(tokenizer)(["a red seven"]), tokenizer(["a red seven"]))
