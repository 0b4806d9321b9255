"""Conditions that are pictures or boxes, which networks are told in training as the tasks tell them in sampling."""

from typing import Any

import pytest
import torch

from ldm.conditioners import Combined, Layout, LowResolution, MaskedImage, Unconditional
from ldm.conditioners.low_resolution import SCHEDULE
from ldm.diffusion import Conditioning


def batch_of(count: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(count, 1, 8, 8)
    mask[:, :, 2:6] = 1
    return {
        "caption": [""] * count,
        "image": torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1,
        "mask": mask,
        "masked_image_latents": torch.rand(count, 4, 4, 4, generator=generator),
        "low_res": torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1,
        "position": torch.arange(count) + 10,
    }


def test_each_convention_joins_mask_and_latents_in_its_own_way() -> None:
    batch = batch_of()
    small = batch["mask"][:, :, ::2, ::2]
    diffusion, latent = MaskedImage("stable_diffusion"), MaskedImage("latent_diffusion")
    assert torch.equal(diffusion(batch).concat, torch.cat([small, batch["masked_image_latents"]], 1))
    assert torch.equal(latent(batch).concat, torch.cat([batch["masked_image_latents"], 2 * small - 1], 1))
    for conditioner, colour in ((diffusion, 0.0), (latent, -1.0)):
        (masked,) = conditioner.pictures(batch).values()
        assert (masked[:, :, 2:6] == colour).all()
        assert torch.equal(masked[:, :, :2], batch["image"][:, :, :2])
    with pytest.raises(ValueError, match=r"expected image and mask; train on shards of images with derive=mask"):
        diffusion.pictures({"caption": []})
    with pytest.raises(ValueError, match=r"conditioner\.convention='sd'"):
        MaskedImage("sd")


def test_the_small_picture_is_told_as_it_is_or_under_noise_of_a_level_that_is_told() -> None:
    batch = batch_of(64)
    assert torch.equal(LowResolution()(batch).concat, batch["low_res"])
    noisy = LowResolution(350, seed=1)
    cond = noisy(batch)
    assert cond.vector.dtype == torch.int64 and cond.vector.min() >= 0 and cond.vector.max() <= 350
    assert len(cond.vector.unique()) > 40
    t = ((cond.vector + 1) / 1000).double()
    residual = cond.concat - SCHEDULE.alpha(t).float().view(-1, 1, 1, 1) * batch["low_res"]
    scaled = residual / SCHEDULE.sigma(t).float().view(-1, 1, 1, 1)
    assert abs(scaled.std() - 1) < 0.05
    # Of (seed, position) alone.
    part = {name: value[5:9] for name, value in batch.items() if name != "caption"}
    assert torch.equal(noisy(part).concat, cond.concat[5:9])
    assert not torch.equal(LowResolution(350, seed=2)(part).vector, cond.vector[5:9])


def test_the_small_picture_is_brought_to_the_size_of_the_result_where_that_is_asked_for() -> None:
    batch = batch_of(4)
    large = LowResolution(upscale=4)(batch).concat
    assert large.shape[2:] == tuple(4 * side for side in batch["low_res"].shape[2:])
    constant = LowResolution(upscale=4)({**batch, "low_res": torch.full((4, 3, 4, 4), 0.3)}).concat
    torch.testing.assert_close(constant, torch.full((4, 3, 16, 16), 0.3))
    with pytest.raises(ValueError, match=r"^got conditioner\.upscale=0"):
        LowResolution(upscale=0)


def test_joined_with_others_what_is_always_told_stays() -> None:
    both = Combined([Unconditional(), LowResolution(10)])
    assert both.always_told == ("concat", "vector")
    assert Combined([MaskedImage(), Unconditional()]).pictures(batch_of()).keys() == {"masked_image"}
    assert both.null(2).parts() == {}
    cond, uncond = both.prompt_pair([""], [""], image_size=(8, 8))
    assert cond.parts() == uncond.parts() == {}


def layout() -> Layout:
    torch.manual_seed(0)
    return Layout(16, 1, vocabulary_size=101, max_boxes=3, heads=2, head_dim=8)


def test_boxes_are_three_tokens_each_and_the_last_two_say_all_is_shown() -> None:
    boxes = torch.tensor([[[7, 0.0, 0.0, 1.0, 1.0], [3, 0.5, 0.1, 0.61, 0.2], [-1, 0, 0, 0, 0]]])
    # A grid of 10 x 10: columns and rows 0 to 9.
    assert layout().tokens(boxes).tolist() == [[7, 0, 99, 3, 14, 25, 100, 100, 100, 0, 99]]
    assert Layout(8, 1, heads=1, head_dim=8).tokens(torch.zeros(1, 30, 5)).shape == (1, 92)


def test_a_layout_is_asked_for_as_json_and_null_has_no_box() -> None:
    conditioner = layout()
    box = [7, 0.1, 0.2, 0.5, 0.9]
    cond, uncond = conditioner.prompt_pair([f"[{box}]", ""], ["", ""], image_size=(8, 8))
    known = conditioner({"boxes": torch.tensor([[box]])})
    torch.testing.assert_close(cond.context[:1], known.context)
    torch.testing.assert_close(cond.context[1:], conditioner.null(1).context)
    torch.testing.assert_close(uncond.context, conditioner.null(2).context)
    assert isinstance(known, Conditioning) and known.context.shape == (1, 11, 16)
    for prompt in ("a cat", "[[1, 2]]", str([box] * 4)):
        with pytest.raises(ValueError, match="expected up to 3 boxes as json"):
            conditioner.prompt_pair([prompt], [""], image_size=(8, 8))


@pytest.mark.parametrize(
    ("boxes", "message"), [(torch.zeros(1, 4, 5), "got 4 boxes"), (torch.full((1, 1, 5), 100.0), "classes below 100")]
)
def test_boxes_that_have_no_token_are_refused(boxes: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout()({"boxes": boxes})


@pytest.mark.parametrize(
    ("conditioner", "remedy"), [(LowResolution(), "derive=low_resolution"), (layout(), "derive=boxes")]
)
def test_a_batch_without_names_the_remedy(conditioner: Any, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        conditioner({"caption": [""]})
