import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from ldm.conditioners import CLIPText, Combined, Unconditional
from ldm.diffusion import Guidance
from ldm.diffusion.schedules import EDM, RectifiedFlow, ScaledLinear, Schedule
from ldm.generation import Order, Pipeline, SeededNoise, TextToImage, to_pil
from ldm.samplers import DDIM, DDPM, DPMSolverPP2M, Euler, Heun, Sampler

MakePipeline = Callable[..., Pipeline]
PROMPTS = ["red seven", "blue", "seven blue red", "", "red"]
SEEDS = [5, 0, 5, 12345, 2**32 - 1]
# One step of the 255 of a pixel, in images whose values span 2.
ONE_GREY_LEVEL = 2 / 255
SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("sampler", [DDIM(eta=1.0), DDPM(), Heun(), DPMSolverPP2M()], ids=lambda s: type(s).__name__)
def test_a_prompt_and_a_seed_name_a_picture_in_any_batch(sampler: Sampler, make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(sampler=sampler)
    together = pipeline.images(PROMPTS, seeds=SEEDS)
    in_batches = pipeline.images(PROMPTS, seeds=SEEDS, batch_size=2)
    alone = [pipeline.images([p], seeds=[s]) for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert together.flatten(1).std(1).min() > 0.05
    assert_close(in_batches, together, rtol=0, atol=ONE_GREY_LEVEL)
    assert_close(torch.cat(alone), together, rtol=0, atol=ONE_GREY_LEVEL)


def test_another_seed_and_another_prompt_are_other_pictures(make_pipeline: MakePipeline) -> None:
    images = make_pipeline().images(["red", "red", "blue", "red"], seeds=[0, 1, 0, 0])
    assert_close(images[3], images[0], rtol=0, atol=ONE_GREY_LEVEL)
    for other in (1, 2):
        assert (images[other] - images[0]).abs().max() > 10 * ONE_GREY_LEVEL


def test_images_have_the_asked_size_and_range(make_pipeline: MakePipeline) -> None:
    images = make_pipeline().images(["red"], seeds=[0], image_size=24)
    assert images.shape == (1, 3, 24, 24)
    assert images.abs().max() <= 1
    assert make_pipeline().images(["red"], seeds=[0], image_size=[16, 24]).shape == (1, 3, 16, 24)


def test_sample_is_images_as_pictures(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    pictures = pipeline.sample(["red", "blue"], seeds=[0, 1])
    expected = to_pil(pipeline.images(["red", "blue"], seeds=[0, 1]))
    assert [picture.size for picture in pictures] == [(16, 16)] * 2
    for picture, other in zip(pictures, expected, strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(other))


def test_settings_of_one_call_leave_the_defaults_alone(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(sampler=Euler())
    before = pipeline.images(["red"], seeds=[0])
    changed = pipeline.images(["red"], seeds=[0], num_steps=9, guidance=Guidance(scale=5.0))
    assert (changed - before).abs().max() > ONE_GREY_LEVEL
    assert_close(pipeline.images(["red"], seeds=[0]), before, rtol=0, atol=0)


def test_guidance_towards_what_it_leads_away_from_is_no_guidance(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    plain = pipeline.images(["red"], seeds=[0], guidance=Guidance(scale=1.0))
    same = pipeline.images(["red"], seeds=[0], negative_prompt="red", guidance=Guidance(scale=6.0))
    away = pipeline.images(["red"], seeds=[0], negative_prompt="blue", guidance=Guidance(scale=6.0))
    assert_close(same, plain, rtol=0, atol=1e-4)
    assert (away - plain).abs().max() > ONE_GREY_LEVEL


def test_the_null_condition_is_what_guidance_leads_away_from(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    scale_0 = pipeline.images(["red"], seeds=[0], guidance=Guidance(scale=0.0))
    empty = pipeline.images([""], seeds=[0], guidance=Guidance(scale=1.0))
    assert_close(scale_0, empty, rtol=0, atol=1e-4)


def test_a_trajectory_ends_in_the_picture(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(sampler=Euler(), num_steps=3)
    steps = pipeline.trajectory("red", seed=4)
    assert len(steps) == 3
    (picture,) = pipeline.sample(["red"], seeds=[4])
    assert_pictures_close(steps[-1][0], picture)
    # At t = 0 the sample is what was believed.
    assert_pictures_close(steps[-1][1], picture)
    assert not np.array_equal(np.asarray(steps[0][0]), np.asarray(picture))


def assert_pictures_close(first: Image.Image, second: Image.Image) -> None:
    difference = np.asarray(first, dtype=int) - np.asarray(second, dtype=int)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    "schedule", [EDM(sigma_max=80.0), ScaledLinear(), RectifiedFlow()], ids=["edm", "linear", "flow"]
)
def test_sampling_starts_from_the_seed_s_noise_at_the_schedule_s_level(
    schedule: Schedule, make_pipeline: MakePipeline
) -> None:
    pipeline = make_pipeline(schedule=schedule)
    first = next(pipeline.steps([Order("red", 3)], task=TextToImage(), settings=pipeline.settings))
    level = 80.0 if isinstance(schedule, EDM) else 1.0
    assert (first.number, first.is_last) == (0, False)
    assert_close(first.state.x, level * SeededNoise([3], (4, 8, 8))())


def test_sampling_leaves_no_gradient_graph(make_pipeline: MakePipeline) -> None:
    assert not make_pipeline().images(["red"], seeds=[0]).requires_grad


@pytest.mark.parametrize(("prompts", "seeds"), [(["red"], [0, 1]), (["red", "blue"], [0]), ([], [])])
def test_prompts_and_seeds_come_in_equal_number(
    prompts: list[str], seeds: list[int], make_pipeline: MakePipeline
) -> None:
    with pytest.raises(ValueError, match=rf"^got {len(prompts)} prompts and {len(seeds)} seeds, expected"):
        make_pipeline().images(prompts, seeds=seeds)


def test_a_text_alone_is_one_prompt(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    assert_close(pipeline.images("red", seeds=[0]), pipeline.images(["red"], seeds=[0]))


def test_a_size_that_does_not_divide_is_refused_at_construction_and_in_a_call(make_pipeline: MakePipeline) -> None:
    # The autoencoder divides by 2, the network by 2.
    with pytest.raises(ValueError, match=r"^got a picture of 18x18 pixels, .* multiples of 4, .* set image_size=16$"):
        make_pipeline(image_size=18)
    with pytest.raises(ValueError, match=r"^got a picture of 1x24 pixels, .* set image_size=\[24,4\]$"):
        make_pipeline().images(["red"], seeds=[0], image_size=[24, 1])


@pytest.mark.parametrize("size", [0, [16], [16, 16, 16], "16", [16.0, 16], [-4, 4]])
def test_a_size_that_is_none_is_refused(size: object, make_pipeline: MakePipeline) -> None:
    with pytest.raises(ValueError, match=r"^got image_size=.*, expected one number of pixels, or two"):
        make_pipeline().images(["red"], seeds=[0], image_size=size)


def test_long_prompts_leave_the_pictures_of_short_ones_alone(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(conditioner=CLIPText(SIZES))
    prompts = ["a red seven", "seven " * 200, "a blue seven"]
    lengths = [pipeline.conditions([Order(p, 0)], (16, 16))[0].context.shape[1] for p in prompts]
    assert lengths == [77, 231, 77]
    orders = [Order(prompt, 0) for prompt in prompts]
    assert list(pipeline.batches(orders, 64)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    together = pipeline.images(prompts, seeds=[0, 0, 0])
    alone = torch.cat([pipeline.images([prompt], seeds=[0]) for prompt in prompts])
    assert_close(together, alone, rtol=0, atol=ONE_GREY_LEVEL / 10)


def test_prompts_are_encoded_once_and_a_cut_is_told_once_a_prompt(make_pipeline: MakePipeline) -> None:
    parts = [CLIPText(SIZES, max_chunks=2), CLIPText(SIZES, max_chunks=2)]
    pipeline, calls = make_pipeline(conditioner=Combined(parts), context_dim=16), []
    for part in parts:
        part.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    prompts = ["red " * 200, "blue " * 200, "seven " * 200, "seven"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        pipeline.images(prompts, seeds=range(4), batch_size=2)
    # Three batches, of two encoders and two sides.
    assert len(calls) == 3 * 2 * 2
    cuts = [str(warning.message) for warning in caught if "cut" in str(warning.message)]
    assert [cut.split("'")[1].split()[0] for cut in cuts] == ["red", "blue", "seven"]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_model_without_conditions_is_asked_once_a_step(scale: float, make_pipeline: MakePipeline) -> None:
    options = {"context_dim": None, "conditioner": Unconditional(), "sampler": Euler(), "num_steps": 3}
    pipeline, seen = make_pipeline(**options, guidance=Guidance(scale=scale)), []
    pipeline.denoiser.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    pipeline.images([""] * 2, seeds=[0, 1])
    assert seen == [2] * 3


def test_guidance_that_can_have_no_effect_is_refused(make_pipeline: MakePipeline) -> None:
    blind = make_pipeline(context_dim=None, conditioner=Unconditional())
    with pytest.raises(ValueError, match=r"^got guidance\.scale=2 for a model without conditions, .* leave it out$"):
        blind.images([""], seeds=[0], guidance=Guidance(scale=2.0))
    assert blind.images([""], seeds=[0], guidance=Guidance(scale=1.0)).shape == (1, 3, 16, 16)
    pipeline = make_pipeline(guidance=Guidance(scale=1.0))
    with pytest.raises(ValueError, match=r"^got the negative prompt 'blue' with guidance\.scale=1, .* has no effect"):
        pipeline.images(["red"], seeds=[0], negative_prompt="blue")
    assert pipeline.images(["red"], seeds=[0]).shape == (1, 3, 16, 16)


def test_states_need_no_gradient_whoever_asks_for_them(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(num_steps=2)
    start = TextToImage().start(pipeline, [Order("red", 0)], pipeline.settings)
    assert torch.is_grad_enabled()
    states = list(pipeline.states(start, pipeline.settings))
    assert len(states) == 3
    assert not any(state.x.requires_grad for state in states)


def test_steps_come_batch_after_batch(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(num_steps=3)
    orders = [Order("red", seed) for seed in range(5)]
    steps = list(pipeline.steps(orders, task=TextToImage(), settings=pipeline.settings, batch_size=2))
    assert [(step.part.start, step.part.stop, step.number) for step in steps] == [
        (start, stop, number) for start, stop in [(0, 2), (2, 4), (4, 5)] for number in range(4)
    ]
    assert {len(step.state.x) for step in steps} == {2, 1}
