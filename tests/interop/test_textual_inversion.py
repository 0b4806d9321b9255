"""Embeddings of new words: the files of diffusers and of the web interfaces, and what they make captions mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from lora_models import sd1, sdxl
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from ldm.interop.text_encoders import clip_vocabulary
from ldm.interop.textual_inversion import apply_embedding, read_embedding, write_embedding

VECTORS = torch.linspace(-1, 1, 32).reshape(2, 16)


def encoded(conditioner: Any, caption: str) -> torch.Tensor:
    with torch.no_grad():
        return conditioner({"caption": [caption]}).context


@pytest.mark.parametrize("format", ["diffusers", "a1111"])
def test_a_written_word_means_the_same_in_diffusers(format: Any, tmp_path: Path) -> None:
    _, conditioner = sd1()
    vocabulary, merges = clip_vocabulary()
    merges = [tuple(pair.split()) for pair in merges]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token="<|endoftext|>")
    write_embedding(tmp_path / "toy.safetensors", token="toy-word", vectors=[VECTORS], format=format)

    class Pipe(TextualInversionLoaderMixin):
        components: dict = {}  # noqa: RUF012 - what their mixin looks for
        hf_device_map = None

    token = None if format == "diffusers" else "toy-word"
    pipe, theirs = Pipe(), sd1()[1].transformer
    pipe.load_textual_inversion(tmp_path / "toy.safetensors", token=token, tokenizer=tokenizer, text_encoder=theirs)
    prompt = pipe.maybe_convert_prompt("a red toy-word on a table", tokenizer)
    ids = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    apply_embedding(conditioner, tmp_path / "toy.safetensors", token=token)
    with torch.no_grad():
        expected = theirs(ids).last_hidden_state
    torch.testing.assert_close(encoded(conditioner, "a red toy-word on a table"), expected, atol=1e-5, rtol=1e-5)


def test_the_word_is_the_files_own_or_its_name(tmp_path: Path) -> None:
    for format, word in (("diffusers", "stated"), ("a1111", "named")):
        write_embedding(tmp_path / "named.safetensors", token="stated", vectors=[VECTORS], format=format)
        assert apply_embedding(sd1()[1], tmp_path / "named.safetensors") == word


def test_a_word_of_sdxl_teaches_both_encoders(tmp_path: Path) -> None:
    write_embedding(tmp_path / "toy.safetensors", token="x", vectors=[VECTORS, VECTORS.flip(0)])
    _, conditioner = sdxl()
    before = [[encoded(part, caption) for caption in ("a toy", "a dog")] for part in conditioner.conditioners]
    assert apply_embedding(conditioner, tmp_path / "toy.safetensors") == "toy"
    for part, (toy, dog) in zip(conditioner.conditioners, before, strict=True):
        assert not torch.equal(encoded(part, "a toy"), toy)
        assert torch.equal(encoded(part, "a dog"), dog)


@pytest.mark.parametrize(
    "content",
    [
        {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": torch.nn.Parameter(VECTORS)},
            "name": "toy",
            "step": 9,
        },
        {"toy": VECTORS},
    ],
)
def test_old_pickles_are_read(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "toy.pt")
    word, (vectors,) = read_embedding(tmp_path / "toy.pt")
    assert word in (None, "toy")
    torch.testing.assert_close(vectors, VECTORS)


def test_one_vector_without_a_batch_is_one_token(tmp_path: Path) -> None:
    save_file({"toy": VECTORS[0].clone()}, tmp_path / "toy.safetensors")
    assert read_embedding(tmp_path / "toy.safetensors")[1][0].shape == (1, 16)


def wrong_width(folder: Path) -> Any:
    save_file({"toy": torch.zeros(1, 8)}, folder / "x.safetensors")
    return apply_embedding(sd1()[1], folder / "x.safetensors")


def for_sdxl(folder: Path) -> Any:
    write_embedding(folder / "x.safetensors", token="x", vectors=[VECTORS, VECTORS.clone()])
    return apply_embedding(sd1()[1], folder / "x.safetensors")


def several(folder: Path) -> Any:
    save_file({"a": VECTORS, "b": VECTORS.clone()}, folder / "x.safetensors")
    return read_embedding(folder / "x.safetensors")


def damaged(folder: Path) -> Any:
    (folder / "x.pt").write_bytes(b"no pickle")
    return read_embedding(folder / "x.pt")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (wrong_width, r"vectors of width \[8\], expected \[16\]"),
        (for_sdxl, r"vectors of width \[16, 16\], expected \[16\]"),
        (several, "with 2 tensors, such as a, expected the embedding of one word"),
        (damaged, "which is damaged or not only tensors"),
        (lambda folder: write_embedding(folder / "x", token="x", vectors=[VECTORS], format="pt"), "got format=pt"),
        (lambda folder: write_embedding(folder / "x", token="x", vectors=[]), "got vectors of 0 text encoders"),
    ],
)
def test_what_is_no_embedding_for_this_model_is_refused(
    act: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        act(tmp_path)
