"""Stored text embeddings stand in for their encoder, and for no other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_oracles import clip_text as random_clip_text
from safetensors.torch import save_file
from torch.testing import assert_close

from ldm.conditioners import CLIPText, Combined, Conditioner, PrecomputedText, SizeCrop, TextTransformer, WordTokenizer
from ldm.conditioners.precomputed import embedded, null_bytes, text_sha256

CAPTIONS = ["a cat", "", "dog cat"]


def transformer(seed: int = 0, *, words: tuple[str, ...] = ("cat", "dog"), **settings: Any) -> TextTransformer:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"width": 8, "depth": 1, "num_heads": 2, "pooling": "sum"} | settings
    return TextTransformer(WordTokenizer(["a", *words], length=5), **options).eval().requires_grad_(False)


def clip_text(**settings: Any) -> CLIPText:
    """The same weights every time."""
    torch.manual_seed(0)
    return random_clip_text(**settings)


def pair_of_clips() -> Combined:
    return Combined([clip_text(null="zeros"), clip_text(null="zeros", pooled=True, layer=1)]).eval()


ENCODERS: dict[str, Callable[[], Conditioner]] = {"mask": transformer, "several": pair_of_clips}


@pytest.fixture
def make_stored(tmp_path: Path) -> Callable[..., PrecomputedText]:
    """Embeddings of an encoder, without or with what builds it."""

    def make(made_by: Conditioner, **options: Any) -> PrecomputedText:
        (tmp_path / "text.safetensors").write_bytes(null_bytes(made_by, dtype=torch.float32))
        return PrecomputedText(tmp_path / "text.safetensors", **options)

    return make


def batch_of(encoder: Conditioner) -> dict[str, Any]:
    """A batch as data sets give it."""
    return {"caption": CAPTIONS, **{f"text_{name}": part for name, part in embedded(encoder, CAPTIONS).items()}}


@pytest.mark.parametrize("build", ENCODERS.values(), ids=ENCODERS.keys())
def test_it_says_what_its_encoder_says(build: Callable[[], Any], make_stored: Callable[..., PrecomputedText]) -> None:
    encoder = build()
    builders = build if build is transformer else [lambda part=part: part for part in encoder.conditioners]
    stored = make_stored(encoder, encoder=builders)
    assert_close(stored(batch_of(encoder)).parts(), encoder({"caption": CAPTIONS}).parts())
    assert_close(stored.null(2).parts(), encoder.null(2).parts())
    assert list(stored.parameters()) == [] and stored.state_dict() == {}
    prompts, negatives = ["a cat", "dog"], ["", "cat"]
    ours = stored.prompt_pair(prompts, negatives, image_size=(64, 64))
    theirs = encoder.prompt_pair(prompts, negatives, image_size=(64, 64))
    assert_close([c.parts() for c in ours], [c.parts() for c in theirs])
    assert stored.num_chunks("cat " * 100) == encoder.num_chunks("cat " * 100)
    assert stored.state_dict() == {}


def test_dropping_every_condition_leaves_the_null_condition(make_stored: Callable[..., PrecomputedText]) -> None:
    stored = make_stored(transformer())
    cond = stored(batch_of(transformer())).select(torch.ones(3, dtype=torch.bool), stored.null(3))
    assert_close(cond.parts(), stored.null(3).parts())


def test_half_precision_on_the_disk_is_read_in_the_models_own(make_stored: Callable[..., PrecomputedText]) -> None:
    stored, batch = make_stored(transformer()), batch_of(transformer())
    half = {name: part.half() if name == "text_context" else part for name, part in batch.items()}
    assert stored(half).context.dtype == torch.float32  # type: ignore[union-attr]
    assert stored.to(torch.bfloat16)(half).context.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert stored(half).mask.dtype == torch.bool  # type: ignore[union-attr]


def test_it_stands_beside_other_conditions(make_stored: Callable[..., PrecomputedText]) -> None:
    encoder, sizes = clip_text(pooled=True), SizeCrop(["crop_top"], dim=4)
    whole, stored = Combined([encoder, sizes]), Combined([make_stored(encoder), sizes])
    batch = {**batch_of(encoder), "crop_top": torch.tensor([1.0, 2.0, 3.0])}
    assert_close(stored(batch).parts(), whole(batch).parts())
    assert_close(stored.null(1).parts(), whole.null(1).parts())
    assert stored.columns == ("crop_top",)


def test_the_hash_tells_whatever_changes_an_embedding() -> None:
    different = [
        transformer(),
        transformer(1),
        transformer(pooling="none"),
        transformer(words=("dog", "cat")),
        clip_text(),
        clip_text(layer=1),
        clip_text(final_norm=False),
        clip_text(null="zeros"),
        clip_text(padding="zero"),
        Combined([clip_text()]),
    ]
    assert len({text_sha256(encoder) for encoder in different}) == len(different)
    assert text_sha256(transformer()) == text_sha256(transformer())
    assert text_sha256(clip_text(max_chunks=2)) == text_sha256(clip_text())


def test_prompts_need_the_very_encoder(make_stored: Callable[..., PrecomputedText]) -> None:
    with pytest.raises(ValueError, match=r"conditioner\.encoder: got none, .* set conditioner\.encoder"):
        make_stored(transformer()).prompt_pair(["cat"], [""], image_size=(8, 8))
    with pytest.raises(ValueError, match=r"conditioner\.encoder: got the text encoder .*, expected"):
        make_stored(transformer(), encoder=lambda: transformer(1)).num_chunks("cat")


def test_what_is_missing_or_no_text_encoder_is_said(
    make_stored: Callable[..., PrecomputedText], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"got a batch without text_context, .*ldm data encode conditioner="):
        make_stored(clip_text())({"caption": ["cat"]})
    with pytest.raises(FileNotFoundError, match=r"conditioner\.path: got .*nowhere.*run it first"):
        PrecomputedText(tmp_path / "nowhere")
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        PrecomputedText(tmp_path / "broken")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"expected the text\.safetensors of ldm data encode"):
        PrecomputedText(tmp_path / "other")
    with pytest.raises(ValueError, match="expected a text encoder, which reads captions alone"):
        embedded(make_stored(transformer()), CAPTIONS)
