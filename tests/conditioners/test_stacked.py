"""Text encoders one after another."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.conditioners import Combined, Conditioner, Stacked
from ldm.diffusion import Conditioning


class Says(Conditioner):
    """What it was told to say; nothing in zeros."""

    def __init__(self, **parts: Tensor) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        return Conditioning(**self.parts)

    def null(self, n: int) -> Conditioning:
        return Conditioning(**{name: torch.zeros_like(part) for name, part in self.parts.items()})


ONE = {"context": torch.ones(2, 3, 4), "vector": torch.full((2, 5), 1.0)}
TWO = {"context": torch.full((2, 3, 6), 2.0), "vector": torch.full((2, 7), 2.0)}
LONG = {"context": torch.full((2, 8, 16), 3.0)}


def test_tokens_follow_each_other_and_narrow_ones_are_filled_up_with_zeros() -> None:
    """The picture of Esser et al. 2024, appendix B.3: CLIP's 768 + 1280 of 4096 channels, then T5's tokens."""
    stacked = Stacked([Combined([Says(**ONE), Says(**TWO)]), Says(**LONG)])

    cond = stacked({"caption": ["a", "b"]})

    assert cond.context is not None and cond.context.shape == (2, 11, 16)
    assert_close(cond.context[0, :3], torch.tensor([1.0] * 4 + [2.0] * 6 + [0.0] * 6).expand(3, 16))
    assert_close(cond.context[:, 3:], LONG["context"])
    assert_close(cond.vector, torch.cat([ONE["vector"], TWO["vector"]], dim=1))
    assert cond.mask is None
    cond, uncond = stacked.prompt_pair(["a", "b"], ["", ""], image_size=(8, 8))
    assert_close(uncond.context, torch.zeros(2, 11, 16))


def test_tokens_of_a_part_without_a_mask_are_real() -> None:
    mask = torch.tensor([[True] * 2 + [False] * 6] * 2)
    cond = Stacked([Says(**ONE), Says(**LONG, mask=mask)])({"caption": ["a", "b"]})
    assert cond.mask is not None
    assert cond.mask[0].tolist() == [True] * 5 + [False] * 6


def test_a_part_without_a_context_is_refused() -> None:
    with pytest.raises(ValueError, match="got a part without a context"):
        Stacked([Says(**LONG), Says(vector=torch.zeros(2, 3))])({"caption": ["a", "b"]})
