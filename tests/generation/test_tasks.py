"""What each task does to the picture that it starts from, and which models it refuses."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from ldm.autoencoders import IdentityAutoencoder
from ldm.conditioners import ClassLabel, CLIPText, Unconditional
from ldm.diffusion import Guidance
from ldm.generation import (
    ImageToImage,
    Inpaint,
    Interpolate,
    Order,
    Outpaint,
    Pipeline,
    Task,
    TextToImage,
    TwoPass,
    Upscale,
    Variations,
)
from ldm.generation.inpaint import latent_mask
from ldm.generation.outpaint import faded
from ldm.generation.pictures import to_image
from ldm.generation.task import strength_times
from ldm.samplers import DDIM, DPMSolverPP2M, Euler

MakePipeline = Callable[..., Pipeline]
ONE_GREY_LEVEL = 2 / 255


def picture(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask(width: int = 16, height: int = 16) -> Image.Image:
    """White on the left half."""
    drawn = Image.new("L", (width, height), "black")
    drawn.paste("white", (0, 0, width // 2, height))
    return drawn


def draw(pipeline: Pipeline, task: Task, orders: Sequence[Order], *, batch_size: int = 64, **settings: Any) -> Tensor:
    return pipeline.draw(orders, task=task, settings=replace(pipeline.settings, **settings), batch_size=batch_size)


def difference(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().max().item()


TASKS: dict[str, Callable[[], Task]] = {
    "image_to_image": lambda: ImageToImage(picture(), strength=0.75),
    "inpaint": lambda: Inpaint(picture(), mask(), keep_pixels=False),
    "outpaint": lambda: Outpaint(picture(), left=4),
    "two_pass": lambda: TwoPass(),
    "variations": lambda: Variations(),
    "variations of an image": lambda: Variations(image=picture(), amount=1.0),
    "interpolate": lambda: Interpolate(num_frames=3),
}


@pytest.mark.parametrize("name", TASKS)
def test_pictures_do_not_depend_on_the_batch_and_do_on_the_seed(name: str, make_pipeline: MakePipeline) -> None:
    pipeline, task = make_pipeline(sampler=DDIM(eta=1.0)), TASKS[name]()
    orders = task.orders(["red seven"], [3, 4, 5])
    together = draw(pipeline, task, orders)
    assert_close(draw(pipeline, task, orders, batch_size=2), together, rtol=0, atol=ONE_GREY_LEVEL)
    assert min(difference(a, b) for a, b in pairwise(together)) > ONE_GREY_LEVEL


@pytest.mark.parametrize("sampler", [Euler(), DPMSolverPP2M()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", TASKS)
def test_prompts_reach_the_pictures(name: str, sampler: Any, make_pipeline: MakePipeline) -> None:
    pipeline, task = make_pipeline(sampler=sampler), TASKS[name]()
    red, blue = (draw(pipeline, task, task.orders([prompt], [3, 4])) for prompt in ("red", "blue"))
    assert difference(red, blue) > ONE_GREY_LEVEL


def test_more_strength_keeps_less_of_the_image(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(num_steps=10, guidance=Guidance(), autoencoder=IdentityAutoencoder())
    orders = [Order("red", seed) for seed in range(8)]
    errors = [
        (draw(pipeline, ImageToImage(picture(), strength=strength), orders) - to_image(picture()))
        .square()
        .mean()
        .item()
        for strength in (0.1, 0.4, 0.7, 1.0)
    ]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1] / 10


def test_strength_is_the_share_of_the_steps_rounded_down() -> None:
    times = torch.linspace(1, 0, 11)
    assert strength_times(times, 1.0).tolist() == times.tolist()
    assert strength_times(times, 0.59).tolist() == times[5:].tolist()
    with pytest.raises(ValueError, match=r"^got strength=0.09 of 10 steps, which leaves none; .* raise strength"):
        strength_times(times, 0.09)


@pytest.mark.parametrize("strength", [-0.1, 0, 1.01, float("nan")])
@pytest.mark.parametrize(
    "make",
    [
        lambda strength: ImageToImage(picture(), strength=strength),
        lambda strength: Inpaint(picture(), mask(), strength=strength),
        lambda strength: Variations(image=picture(), strength=strength),
        lambda strength: TwoPass(strength=strength),
    ],
    ids=["image_to_image", "inpaint", "variations", "two_pass"],
)
def test_a_strength_out_of_range_is_refused(make: Callable[[float], Task], strength: float) -> None:
    with pytest.raises(ValueError, match=r"^got strength=.*, expected above 0 .* and at most 1"):
        make(strength)


def test_an_image_is_scaled_and_cut_to_the_size_that_is_asked_for(make_pipeline: MakePipeline) -> None:
    task = ImageToImage(picture(40, 20), image_size=[16, 24])
    assert draw(make_pipeline(), task, [Order("red", 0)]).shape == (1, 3, 16, 24)
    assert ImageToImage(picture(40, 20)).image.shape == (1, 3, 20, 40)


def test_inpainting_keeps_the_pixels_outside_the_mask(make_pipeline: MakePipeline) -> None:
    image = to_image(picture())
    made = draw(make_pipeline(), Inpaint(picture(), mask()), [Order("red", 0), Order("red", 1)])
    assert_close(made[..., 8:], image.expand(2, -1, -1, -1)[..., 8:], rtol=0, atol=0)
    assert difference(made[0, ..., :8], made[1, ..., :8]) > 10 * ONE_GREY_LEVEL
    assert difference(made[:1, ..., :8], image[..., :8]) > 10 * ONE_GREY_LEVEL


@pytest.mark.parametrize("name", ["inpaint", "outpaint"])
def test_any_model_ends_with_the_image_s_own_latents_outside_the_mask(name: str, make_pipeline: MakePipeline) -> None:
    pipeline, task = make_pipeline(), TASKS[name]()
    *_, last = pipeline.steps([Order("red", 7)], task=task, settings=pipeline.settings)
    posterior = torch.randn(last.state.x.shape[1:], generator=torch.Generator().manual_seed(7))
    known = latent_mask(task.mask, (last.state.x.shape[-2], last.state.x.shape[-1])) == 0  # type: ignore[attr-defined]
    latents = pipeline.encode(task.image, posterior[None])  # type: ignore[attr-defined]
    assert 0.3 < known.float().mean() < 0.9
    assert_close(torch.where(known, last.state.x, 0.0), torch.where(known, latents, 0.0))
    assert difference(torch.where(known, 0.0, last.state.x), torch.where(known, 0.0, latents)) > 0.1


def test_the_inpainting_model_of_ldm_is_told_latents_then_mask(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(in_channels=9, context_dim=None, conditioner=Unconditional())
    start = Inpaint(picture(), mask()).start(pipeline, [Order("", 0), Order("", 1)], pipeline.settings)
    black = to_image(picture())
    black[..., :8] = -1
    assert start.cond.concat is not None and start.uncond.concat is start.cond.concat
    assert_close(start.cond.concat[:, :4], pipeline.encode(black, None).expand(2, -1, -1, -1))
    assert_close(start.cond.concat[:, 4:], torch.cat([torch.ones(2, 1, 8, 4), -torch.ones(2, 1, 8, 4)], dim=3))
    assert draw(pipeline, Inpaint(picture(), mask()), [Order("", 0)]).shape == (1, 3, 16, 16)


def test_outpainting_adds_pixels_and_fades_into_the_old_ones(make_pipeline: MakePipeline) -> None:
    task = Outpaint(picture(), left=8, bottom=4, feather=3)
    (made,) = draw(make_pipeline(), task, [Order("red", 0)])
    assert made.shape == (3, 20, 24)
    assert_close(made[:, :13, 11:], to_image(picture())[0, :, :13, 3:], rtol=0, atol=0)
    assert difference(made[:, :13, 8:11], to_image(picture())[0, :, :13, :3]) > ONE_GREY_LEVEL


def test_the_mask_of_outpainting_falls_from_each_side_that_grows() -> None:
    grown = faded((6, 5), (2, 0, 0, 1), 2)[0, 0]
    assert grown.shape == (7, 7)
    assert grown[0].tolist() == [1, 1, 0.75, 0.25, 0, 0, 0]
    assert grown[:, -1].tolist() == [0, 0, 0, 0, 0.25, 0.75, 1]
    assert faded((6, 5), (2, 0, 0, 0), 0)[0, 0, 0].tolist() == [1, 1, 0, 0, 0, 0, 0]


def test_outpainting_to_a_size_that_does_not_divide_says_how_much_is_missing(make_pipeline: MakePipeline) -> None:
    with pytest.raises(ValueError, match=r"^got 22x16 pixels with those added, .* add 2 more at left or right and 0 "):
        draw(make_pipeline(), Outpaint(picture(), left=6), [Order("red", 0)])


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({}, r"expected pixels to add at one side at least$"),
        ({"left": -4}, r"^got a negative number in left=-4"),
        ({"top": 4, "left": -4}, r"^got a negative number in left=-4"),
    ],
)
def test_outpainting_needs_pixels_to_add(sides: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Outpaint(picture(), **sides)


def test_two_passes_make_a_larger_picture_of_the_small_one(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(num_steps=20, autoencoder=IdentityAutoencoder())
    small = pipeline.images(["red"], seeds=[0])
    large = draw(pipeline, TwoPass(scale=1.5, strength=0.05), [Order("red", 0)])
    assert large.shape == (1, 3, 24, 24)
    enlarged = torch.nn.functional.interpolate(small, size=(24, 24), mode="bicubic", antialias=True).clamp(-1, 1)
    assert (large - enlarged).square().mean() < 0.1 * (large - enlarged.flip(3)).square().mean()


def test_an_upscaler_without_noise_levels_is_told_the_image_itself(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(in_channels=7)
    start = Upscale(picture(8, 12)).start(pipeline, [Order("", 0), Order("", 1)], pipeline.settings)
    assert start.x.shape == (2, 4, 12, 8)
    assert_close(start.cond.concat, to_image(picture(8, 12)).expand(2, -1, -1, -1))
    assert start.cond.vector is None
    assert draw(pipeline, Upscale(picture(8, 12)), [Order("", 0)]).shape == (1, 3, 24, 16)
    with pytest.raises(ValueError, match=r"^got noise_level=20 for a network that is not told of noise"):
        draw(pipeline, Upscale(picture(8), noise_level=20), [Order("", 0)])


def test_an_upscaler_advises_a_size_of_the_small_picture(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(in_channels=7)
    advice = r"^got a picture to enlarge of 7x11 pixels, expected multiples of 2, .*; set image_size=\[12,8\]$"
    with pytest.raises(ValueError, match=advice):
        draw(pipeline, Upscale(picture(7, 11)), [Order("", 0)])
    obeyed = Upscale(picture(7, 11), image_size=[12, 8])
    assert draw(pipeline, obeyed, [Order("", 0)]).shape == (1, 3, 24, 16)


def test_variations_go_from_the_seed_s_own_picture_to_another_seed_s(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(sampler=DDIM(eta=1.0))
    own, other = pipeline.images(["red", "red"], seeds=[3, 4])
    distances = []
    for amount in (0.05, 0.5, 1.0):
        task = Variations(amount=amount)
        first, varied = draw(pipeline, task, task.orders(["red"], [3, 4]))
        assert_close(first, own, rtol=0, atol=ONE_GREY_LEVEL)
        distances.append((varied - own).square().mean().item())
    assert distances == sorted(distances)
    assert_close(varied, other, rtol=0, atol=ONE_GREY_LEVEL)


def test_interpolation_passes_through_its_key_pictures(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(sampler=DDIM(eta=1.0))
    task = Interpolate(to="blue seven", num_frames=3)
    orders = task.orders(["red", "seven"], [1, 2, 3])
    frames = draw(pipeline, task, orders)
    assert len(frames) == 7
    keys = pipeline.images(["red", "seven", "blue seven"], seeds=[1, 2, 3])
    assert_close(frames[::3], keys, rtol=0, atol=ONE_GREY_LEVEL)
    assert min(difference(a, b) for a, b in pairwise(frames)) > ONE_GREY_LEVEL


def test_interpolation_does_not_jump_where_prompts_differ_in_length(make_pipeline: MakePipeline) -> None:
    """The first steps away from a key picture, and the last towards one, are small; so is that past a short way."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    pipeline = make_pipeline(conditioner=CLIPText(sizes), sampler=DDIM(eta=0.0))
    task, n = Interpolate(to="blue", num_frames=10_000), 10_000
    orders = task.orders(["red", "seven " * 200, "seven"], [0])
    keys = [orders[i * n] for i in range(4)]
    assert [key.prompt for key in keys] == ["red", "seven " * 200, "seven", "blue"]
    near = [orders[1], *(orders[i * n - 1] for i in (1, 2, 3)), *(orders[i * n + 1] for i in (1, 2))]
    frames = draw(pipeline, task, [*keys, *near], batch_size=3)
    assert min(difference(a, b) for a, b in pairwise(frames[:4])) > ONE_GREY_LEVEL
    assert_close(frames[4:], frames[[0, 1, 2, 3, 1, 2]], rtol=0, atol=ONE_GREY_LEVEL / 10)


def test_the_frame_at_amount_zero_is_the_key_picture(make_pipeline: MakePipeline) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    pipeline = make_pipeline(conditioner=CLIPText(sizes))
    key, between, _ = Interpolate(to="seven " * 200, num_frames=2).orders(["red"], [0])
    first, same = draw(pipeline, TextToImage(), [key, replace(between, amount=0.0)])
    assert_close(same, first, rtol=0, atol=1e-6)


def test_interpolated_prompts_are_conditions_on_the_straight_line(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    ends, _ = pipeline.conditions([Order("red", 0), Order("blue seven", 0)], (16, 16))
    middle, uncond = pipeline.conditions([Order("red", 0, "", "blue seven", None, 0.25)], (16, 16))
    assert ends.context is not None and ends.mask is not None and middle.mask is not None
    assert_close(middle.context, torch.lerp(ends.context[:1], ends.context[1:], 0.25))
    assert torch.equal(middle.mask, ends.mask[:1] | ends.mask[1:])
    assert len(uncond) == 1


@pytest.mark.parametrize(
    ("prompts", "seeds", "to"), [(["a"], [1], None), (["a", "b"], [1, 2, 3], None), (["a", "b", "c"], [1, 2], "d")]
)
def test_interpolation_needs_two_key_pictures(prompts: list[str], seeds: list[int], to: str | None) -> None:
    with pytest.raises(ValueError, match=r"to go through, expected at least two of one"):
        Interpolate(to=to).orders(prompts, seeds)


def test_one_seed_serves_all_prompts_and_one_prompt_all_seeds() -> None:
    assert [order.seed for order in Interpolate(to="b", num_frames=2).orders(["a"], [5])] == [5, 5, 5]
    assert [order.prompt for order in Interpolate(num_frames=2).orders(["a"], [5, 6])] == ["a"] * 3
    assert Interpolate(num_frames=2).orders(["a"], [5, 6])[1] == Order("a", 5, "", None, 6, 0.5)


PLAIN = {
    "text_to_image": TextToImage,
    "image_to_image": lambda: ImageToImage(picture()),
    "variations": lambda: Variations(image=picture()),
    "two_pass": TwoPass,
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_task_without_extra_channels_refuses_a_model_with_them(name: str, make_pipeline: MakePipeline) -> None:
    pipeline, task = make_pipeline(in_channels=9), PLAIN[name]()
    with pytest.raises(ValueError, match=r"^got a model that takes 5 channels besides the latents, .*task=inpaint"):
        draw(pipeline, task, task.orders(["red"], [0, 1]))


@pytest.mark.parametrize(
    ("task", "in_channels", "message"),
    [
        (lambda: Upscale(picture(8, 8)), 4, r"^got a model that takes 0 channels .* use task=two_pass"),
        (lambda: Upscale(picture(8, 8)), 9, r"^got a model that takes 5 channels .* use task=two_pass"),
        (
            lambda: Inpaint(picture(), mask()),
            5,
            r"^got a model that takes 1 channels besides the latents, expected none",
        ),
        (lambda: ImageToImage(picture(), depth=mask()), 4, r"^got depth for a model that takes 0 channels"),
        (lambda: ImageToImage(picture()), 5, r"task=image_to_image depth="),
    ],
    ids=["upscale", "upscale-inpainting", "inpaint-depth", "depth", "no-depth"],
)
def test_a_task_refuses_a_model_that_cannot_do_it(
    task: Callable[[], Task], in_channels: int, message: str, make_pipeline: MakePipeline
) -> None:
    with pytest.raises(ValueError, match=message):
        draw(make_pipeline(in_channels=in_channels), task(), [Order("red", 0)])


def test_a_prompt_for_a_model_without_conditions_is_refused(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(context_dim=None, conditioner=Unconditional())
    assert draw(pipeline, TextToImage(), [Order("", 0)]).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"^got the prompt 'red', expected none: this model is unconditional"):
        draw(pipeline, TextToImage(), [Order("red", 0)])


def test_a_class_is_a_prompt(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(conditioner=ClassLabel(10, width=8))
    three, four, again = pipeline.images(["3", "4", "3"], seeds=[0, 0, 0])
    assert difference(three, four) > ONE_GREY_LEVEL
    assert_close(again, three, rtol=0, atol=ONE_GREY_LEVEL)


def test_a_depth_map_of_any_range_is_made_minus_one_to_one(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(in_channels=5)
    levels = np.linspace(1000, 60000, 16 * 16).reshape(16, 16).astype(np.uint16)
    task = ImageToImage(picture(), depth=Image.fromarray(levels))
    concat = task.start(pipeline, [Order("red", 0)], pipeline.settings).cond.concat
    assert concat is not None and concat.shape == (1, 1, 8, 8)
    assert (concat.min().item(), concat.max().item()) == (-1, 1)
    assert bool((concat.flatten().diff() > 0).all())
    with pytest.raises(ValueError, match=r"^depth: got a picture that is the same everywhere"):
        draw(pipeline, ImageToImage(picture(), depth=Image.new("L", (16, 16), 9)), [Order("red", 0)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Variations(amount=0), r"^got amount=0, expected above 0"),
        (lambda: Variations(strength=0.5), r"^got strength without an image"),
        (lambda: Variations().orders(["red"], [1]), r"^got one seed, expected another"),
        (lambda: TwoPass(scale=1.0), r"^got scale=1, expected more than 1"),
        (lambda: Upscale(picture(), noise_level=351), r"^got noise_level=351, expected 0 to 350"),
        (lambda: Interpolate(num_frames=0), r"^got num_frames=0"),
        (lambda: Outpaint(picture(), left=4, feather=17), r"^got feather=17, expected 0 to 16"),
        (lambda: Inpaint(picture(), mask(15, 16)), r"^mask: got 15x16 pixels for an image of 16x16"),
        (lambda: Inpaint(picture(), Image.new("L", (16, 16))), r"^mask: got one without white"),
        (
            lambda: Inpaint(picture(), Image.new("L", (16, 16), 1)),
            r"its brightest level is 1\), expected white, which is 255",
        ),
        (lambda: ImageToImage(picture(), image_size=[1, 2, 3]), r"^got image_size=\[1, 2, 3\], expected one number"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
