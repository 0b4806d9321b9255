"""T5 encoders against transformers."""

from pathlib import Path

import pytest
import torch
from clip_oracles import randomized, relative_error
from torch.testing import assert_close
from transformers import AutoTokenizer, T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Tokenizer

from ldm.conditioners import PretrainedTokenizer, T5Text, WordTokenizer

TINY = {"vocab_size": 120, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
TINY |= {"feed_forward_proj": "gated-gelu"}
CAPTIONS = ["a red fox", "", "fox " * 30]
WORDS = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -1.0), ("▁red", -1.0), ("▁fox", -1.0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5, with its tokenizer beside it."""
    path = tmp_path_factory.mktemp("t5")
    randomized(T5EncoderModel(T5Config(**TINY))).save_pretrained(path)
    T5Tokenizer(vocab=WORDS, extra_ids=0).save_pretrained(path)
    return path


@torch.no_grad()
def test_the_context_is_that_of_transformers(folder: Path) -> None:
    encoder = T5Text.load(folder, length=12)
    batch = AutoTokenizer.from_pretrained(folder)(
        CAPTIONS, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    cond = encoder({"caption": CAPTIONS})
    assert cond.mask is not None
    assert_close(cond.mask, batch["attention_mask"].bool())
    assert cond.mask.sum(1).tolist() == [4, 1, 12], "the words and the end"
    assert relative_error(cond.context, T5EncoderModel.from_pretrained(folder)(**batch).last_hidden_state) < 1e-5


def test_padding_does_not_change_real_tokens(folder: Path) -> None:
    short, long = (T5Text.load(folder, length=n)({"caption": ["a red fox"]}).context for n in (4, 12))
    assert short is not None and long is not None
    assert_close(short, long[:, :4])


@torch.no_grad()
def test_activations_beyond_float16_survive_its_autocast(folder: Path) -> None:
    """As those of T5 v1.1 XXL, whose second linear layers transformers keeps in float32 for it."""
    encoder = T5Text.load(folder, length=12)
    for block in encoder.transformer.encoder.block:
        block.layer[1].DenseReluDense.wo.weight.mul_(1e6)
    expected = encoder({"caption": CAPTIONS}).context
    assert expected is not None and expected.isfinite().all()
    for dtype, tolerance in ((torch.float16, 1e-5), (torch.bfloat16, 0.1)):
        with torch.autocast("cpu", dtype):
            assert relative_error(encoder({"caption": CAPTIONS}).context, expected) < tolerance
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(encoder({"caption": CAPTIONS}).context, expected) > 1e-5, "bfloat16 stays"


def test_null_is_the_empty_caption_or_zeros_with_its_mask(folder: Path) -> None:
    empty, zeros = (T5Text.load(folder, length=6, null=null) for null in ("empty", "zeros"))  # type: ignore[arg-type]
    assert_close(empty.null(2).parts(), empty({"caption": ["", ""]}).parts())
    null = zeros.null(2)
    assert null.context is not None and null.mask is not None
    assert null.context.shape == (2, 6, 32) and not null.context.any()
    assert null.mask.tolist() == [[True] + [False] * 5] * 2


def test_prompts_are_read_as_they_are(folder: Path) -> None:
    encoder = T5Text.load(folder, length=6)
    cond, uncond = encoder.prompt_pair(["a (fox:1.5)"], [""], image_size=(8, 8))
    assert_close(cond.parts(), encoder({"caption": ["a (fox:1.5)"]}).parts())
    assert_close(uncond.parts(), encoder.null(1).parts())


def test_a_whole_t5_model_gives_its_encoder(folder: Path, tmp_path: Path) -> None:
    whole = randomized(T5ForConditionalGeneration(T5Config(**TINY)))
    whole.save_pretrained(tmp_path)
    encoder = T5Text.load(tmp_path, tokenizer_path=folder, length=6)
    ids, mask = encoder.tokenizer(CAPTIONS)
    expected = whole.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    assert relative_error(encoder({"caption": CAPTIONS}).context, expected) < 1e-5


def test_its_arguments_rebuild_it(folder: Path) -> None:
    encoder = T5Text.load(folder, length=6, null="zeros")
    again = T5Text(**encoder.arguments)
    again.load_state_dict(encoder.state_dict())
    assert_close(again({"caption": CAPTIONS}).parts(), encoder({"caption": CAPTIONS}).parts())


def test_it_stays_frozen_and_without_dropout_inside_what_is_trained(folder: Path) -> None:
    encoder = T5Text.load(folder, length=6)
    torch.nn.ModuleDict({"conditioner": encoder}).train()
    assert not any(module.training for module in encoder.modules()) and encoder.is_frozen
    assert not any(p.requires_grad for p in encoder.parameters())


def test_a_missing_tokenizer_is_one_line_with_the_remedy(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got .*nowhere, which cannot be read .*tokenizer\.json"):
        T5Text.load(folder, tokenizer_path=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"got .*nowhere, which cannot be read .*config\.json"):
        T5Text.load(tmp_path / "nowhere", tokenizer_path=folder)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    words = WordTokenizer([f"w{i}" for i in range(200)])
    with pytest.raises(ValueError, match=r"got a tokenizer with 204 ids, expected at most 120"):
        T5Text(TINY, tokenizer=words)


def test_a_tokenizer_cuts_and_pads_to_its_length(folder: Path) -> None:
    ids, mask = PretrainedTokenizer(folder, length=4)(["a red fox fox fox", "a"])
    assert ids.tolist() == [[4, 5, 6, 1], [4, 1, 0, 0]]
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]
