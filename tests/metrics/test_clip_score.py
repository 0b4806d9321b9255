import pytest
import torch
from metric_helpers import Pixels, Words
from torch.testing import assert_close

from ldm.metrics import CLIPScore


def pure(classes: list[int]) -> torch.Tensor:
    """Images whose embedding is one axis: pixel `class` white, the other three of the first four grey."""
    pictures = torch.zeros(len(classes), 1, 2, 2)
    for picture, place in zip(pictures, classes, strict=True):
        picture.view(-1)[place] = 1
    return pictures.expand(-1, 3, -1, -1)


def score(pictures: torch.Tensor, prompts: list[str]) -> float:
    metric = CLIPScore(Words())
    metric.update(pictures, prompts)
    return metric.compute().item()


def test_an_image_of_its_prompt_scores_a_hundred() -> None:
    assert score(pure([0, 1, 3]), ["a", "bb", "ddd"]) == pytest.approx(100, abs=1)


def test_an_image_of_something_else_scores_nothing() -> None:
    assert score(pure([0, 1]), ["b", "c"]) == pytest.approx(0, abs=1)


def test_half_a_prompt_scores_the_cosine() -> None:
    assert score(pure([0]), ["ab"]) == pytest.approx(100 / 2**0.5, abs=1)


def test_pixels_beyond_the_range_count_as_clamped() -> None:
    assert_close(score(pure([0]) * 3, ["ac"]), score(pure([0]), ["ac"]))


def test_prompts_and_images_have_to_match() -> None:
    with pytest.raises(ValueError, match="got 2 images with 1 prompts"):
        score(pure([0, 1]), ["a"])


def test_a_network_without_texts_is_refused() -> None:
    with pytest.raises(ValueError, match="got Pixels for the CLIP score"):
        CLIPScore(Pixels())
