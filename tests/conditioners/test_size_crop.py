"""Size, crop and aesthetic conditions."""

import math

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor
from torch.testing import assert_close

from ldm.conditioners import SizeCrop
from ldm.conditioners.size_crop import SDXL, SDXL_REFINER
from ldm.diffusion import Conditioning

BATCH = {
    "original_height": torch.tensor([600, 1024]),
    "original_width": torch.tensor([800, 768]),
    "crop_top": torch.tensor([0, 12]),
    "crop_left": torch.tensor([7, 0]),
    "target_height": torch.tensor([512, 512]),
    "target_width": torch.tensor([512, 640]),
}


def vector(cond: Conditioning) -> Tensor:
    assert set(cond.parts()) == {"vector"} and cond.vector is not None
    return cond.vector


def test_each_column_is_embedded_as_in_diffusers_and_they_follow_each_other() -> None:
    numbers = torch.stack([BATCH[name] for name in SDXL], 1)
    theirs = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(numbers.flatten()).reshape(2, -1)
    ours = vector(SizeCrop()(BATCH))
    assert ours.shape == (2, 6 * 256) and ours.dtype == torch.float32
    assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_an_embedding_is_cosines_then_sines() -> None:
    conditioner = SizeCrop(["x"], dim=4, defaults={"x": 0})
    assert_close(
        vector(conditioner({"x": [2.0]})), torch.tensor([[math.cos(2), math.cos(0.02), math.sin(2), math.sin(0.02)]])
    )


def test_a_pair_tells_both_sides_the_size_of_the_picture_to_come_uncropped() -> None:
    conditioner = SizeCrop()
    cond, uncond = conditioner.prompt_pair(["a", "b"], ["", "bad"], image_size=(512, 640))
    sizes = dict(zip(SDXL, ([v, v] for v in (512, 640, 0, 0, 512, 640)), strict=True))
    expected = vector(conditioner(sizes))
    assert_close(vector(cond), expected)
    assert_close(vector(uncond), expected)


def test_the_refiner_is_told_a_better_picture_and_a_worse_one() -> None:
    conditioner = SizeCrop(SDXL_REFINER)
    cond, uncond = conditioner.prompt_pair(["a"], [""], image_size=(512, 640))
    for side, score in ((cond, 6.0), (uncond, 2.5)):
        values = dict(zip(SDXL_REFINER, ([v] for v in (512, 640, 0, 0, score)), strict=True))
        assert_close(vector(side), vector(conditioner(values)))
    assert vector(cond).shape == (1, 5 * 256)


@pytest.mark.parametrize("columns", [SDXL, SDXL_REFINER])
def test_null_is_what_guidance_leads_away_from_at_the_models_own_size(columns: tuple[str, ...]) -> None:
    conditioner = SizeCrop(columns)
    _, uncond = conditioner.prompt_pair(["a"] * 3, [""] * 3, image_size=(1024, 1024))
    assert_close(vector(conditioner.null(3)), vector(uncond))


def test_the_models_own_size_and_other_columns_can_be_set() -> None:
    conditioner = SizeCrop(["target_height", "rating"], dim=8, defaults={"target_height": 512, "rating": 3})
    assert_close(vector(conditioner.null(1)), vector(conditioner({"target_height": [512], "rating": [3]})))
    _, uncond = conditioner.prompt_pair(["a"], [""], image_size=(64, 32))
    assert_close(vector(uncond), vector(conditioner({"target_height": [64], "rating": [3]})))
    worse = SizeCrop(["rating"], dim=8, defaults={"rating": 3}, null_defaults={"rating": 1})
    assert_close(vector(worse.null(1)), vector(worse({"rating": [1]})))


def test_a_batch_without_the_columns_is_refused_with_the_remedy() -> None:
    batch = {"caption": ["x"], "original_height": torch.tensor([1])}
    with pytest.raises(
        ValueError,
        match=r"^got a batch with \['caption', 'original_height'\], expected original_width, .*"
        r"set data\.columns=\[original_height,original_width,",
    ):
        SizeCrop()(batch)


@pytest.mark.parametrize("columns", [["rating"], []])
def test_columns_without_a_default_are_refused(columns: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^got conditioner\.columns=\[.*expected names with a default"):
        SizeCrop(columns)


def test_it_gives_the_dtype_of_its_model_and_nothing_to_load() -> None:
    conditioner = SizeCrop().half()
    assert vector(conditioner(BATCH)).dtype == torch.float16
    assert_close(vector(conditioner(BATCH)), vector(SizeCrop()(BATCH)).half())
    assert conditioner.state_dict() == {}


def test_built_on_meta_it_still_gives_numbers() -> None:
    with torch.device("meta"):
        conditioner = SizeCrop()
    assert_close(vector(conditioner(BATCH)), vector(SizeCrop()(BATCH)))
