"""Several conditioners as one."""

from typing import Any

import pytest
import torch
from clip_oracles import TINY, clip_text, open_clip_text
from torch import Tensor
from torch.testing import assert_close

from ldm.conditioners import ClassLabel, Combined, Conditioner, SizeCrop, TextTransformer, Unconditional, WordTokenizer
from ldm.conditioners.combined import join
from ldm.conditioners.size_crop import SDXL
from ldm.diffusion import Conditioning


class Stub(Conditioner):
    """Says what it was told to."""

    def __init__(self, **parts: Tensor) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        return Conditioning(**self.parts)

    def null(self, n: int) -> Conditioning:
        return Conditioning(**{name: torch.zeros_like(part) for name, part in self.parts.items()})


@pytest.fixture(scope="module")
def sdxl() -> Combined:
    """SDXL's conditioner with tiny encoders."""
    first = clip_text(layer=2, final_norm=False, null="zeros")
    second = open_clip_text(final_norm=False, pooled=True, null="zeros")
    return Combined([first, second, SizeCrop(dim=8)])


def test_contexts_and_vectors_are_joined_in_order(sdxl: Combined) -> None:
    batch = {"caption": ["a fox", "b"], **{name: torch.tensor([64, 32]) for name in SDXL}}
    parts = [part(batch) for part in sdxl.conditioners]
    cond = sdxl(batch)
    assert cond.context is not None and cond.vector is not None and cond.mask is None
    assert_close(cond.context, torch.cat([parts[0].context, parts[1].context], -1))
    assert_close(cond.vector, torch.cat([parts[1].vector, parts[2].vector], -1))
    assert cond.context.shape == (2, 77, 64) and cond.vector.shape == (2, 32 + 6 * 8)


def test_null_and_pairs_are_those_of_the_parts(sdxl: Combined) -> None:
    null = sdxl.null(2)
    assert null.context is not None and null.vector is not None
    assert not null.context.any() and not null.vector[:, :32].any() and null.vector[:, 32:].any()
    prompts, negatives = ["a (fox:1.2)", "word " * 80], ["", "bad"]
    cond, uncond = sdxl.prompt_pair(prompts, negatives, image_size=(48, 64))
    pairs = [part.prompt_pair(prompts, negatives, image_size=(48, 64)) for part in sdxl.conditioners]
    for side, joined in enumerate((cond, uncond)):
        assert joined.context is not None
        assert_close(joined.context, torch.cat([pairs[0][side].context, pairs[1][side].context], -1))
        assert_close(joined.vector, torch.cat([pairs[1][side].vector, pairs[2][side].vector], -1))
        assert joined.context.shape[1] == 154


def test_a_prompt_has_as_many_chunks_as_the_part_that_reads_most() -> None:
    assert Combined([SizeCrop(dim=8), clip_text(), Unconditional()]).num_chunks("word " * 80) == 2
    assert Combined([SizeCrop(dim=8)]).num_chunks("word " * 80) == 1


def test_dropout_of_all_conditions_is_null(sdxl: Combined) -> None:
    batch = {"caption": ["a fox", "b"], **{name: torch.tensor([64, 32]) for name in SDXL}}
    dropped = sdxl(batch).select(torch.tensor([True, True]), sdxl.null(2))
    assert_close(dropped.parts(), sdxl.null(2).parts())


def test_its_parts_are_trained_or_frozen_each_for_itself() -> None:
    text = TextTransformer(WordTokenizer(["a"], length=77), width=16, depth=1, num_heads=2)
    combined = Combined([text, SizeCrop()]).train()
    assert text.training and all(p.requires_grad for p in combined.parameters())


def test_a_mask_and_a_concat_pass_through() -> None:
    mask, concat = torch.tensor([[True, False]]), torch.ones(1, 2, 4, 4)
    cond = Combined([Stub(context=torch.ones(1, 2, 3), mask=mask), Stub(concat=concat), Unconditional()])({})
    assert set(cond.parts()) == {"context", "mask", "concat"}
    assert cond.mask is mask and cond.concat is concat


def test_class_ids_alone_stay_ids() -> None:
    assert_close(join([Conditioning(vector=torch.tensor([3, 4])), Conditioning()]).vector, torch.tensor([3, 4]))


CONTEXT, MASK = torch.ones(1, 2, 3), torch.tensor([[True, False]])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"context": CONTEXT}, {"context": torch.ones(1, 4, 3)}], r"contexts of \[2, 4\] tokens"),
        ([{"context": CONTEXT, "mask": MASK}, {"context": CONTEXT}], "different masks"),
        ([{"context": CONTEXT, "mask": MASK}, {"context": CONTEXT, "mask": ~MASK}], "different masks"),
        ([{"vector": torch.tensor([1])}, {"vector": torch.ones(1, 3)}], "class ids beside other vectors"),
        ([{"concat": torch.ones(1, 1, 2, 2)}] * 2, "2 parts with a concat"),
    ],
    ids=["lengths", "one_mask", "masks", "class_ids", "concats"],
)
def test_parts_that_cannot_be_joined_are_refused(parts: list[dict[str, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=f"got .*{message}"):
        Combined([Stub(**part) for part in parts])({})


def test_no_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="got no conditioners"):
        Combined([])


def test_frozen_encoders_are_told_apart_from_what_is_trained() -> None:
    label = ClassLabel(3, width=8)
    combined = Combined([clip_text(), SizeCrop(), label])
    frozen = [name for name, part in combined.named_modules() if getattr(part, "is_frozen", False)]
    assert frozen == ["conditioners.0"]
    assert {name.split(".")[1] for name, p in combined.named_parameters() if p.requires_grad} == {"2"}
    assert TINY["hidden_size"] == combined.conditioners[0].context_dim
