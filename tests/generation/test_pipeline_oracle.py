"""Whole pipelines against those of diffusers with the same weights, from the same generators: the same pixels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_twins import (
    GUIDANCE,
    NUM_STEPS,
    SIZE_DIM,
    diffusers_pipeline,
    diffusers_sdxl,
    sdxl_conditioner,
    small_pipeline,
)
from PIL import Image

from ldm.cli.main import main
from ldm.generation import ImageToImage, Inpaint, Pipeline, Task, TextToImage, Upscale, to_pil

PROMPTS = ["a red fox on the beach", "two dogs"]
SEEDS = [3, 2**32 - 1]
NEGATIVE = "blurry"


def picture(size: int = 32, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def mask(size: int = 32) -> Image.Image:
    drawn = Image.new("L", (size, size), "black")
    drawn.paste("white", (6, 4, 22, 25))
    return drawn


def ours(pipeline: Pipeline, task: Task, *, prompts: list[str] = PROMPTS, seeds: list[int] = SEEDS) -> np.ndarray:
    orders = [
        order for p, s in zip(prompts, seeds, strict=True) for order in task.orders([p], [s], negative_prompt=NEGATIVE)
    ]
    images = pipeline.draw(orders, task=task, settings=pipeline.settings)
    return pixels(to_pil(images))


def theirs(pipeline: Any, *, prompts: list[str] = PROMPTS, seeds: list[int] = SEEDS, **inputs: Any) -> np.ndarray:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    made = pipeline(
        prompts,
        negative_prompt=[NEGATIVE] * len(prompts),
        generator=generators,
        num_inference_steps=NUM_STEPS,
        guidance_scale=GUIDANCE,
        **inputs,
    )
    return pixels(made.images)


def pixels(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(one, dtype=int) for one in pictures])


def assert_same_pixels(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    # Neither grey nor clipped everywhere: pictures that can differ.
    assert expected.std() > 10
    assert ((expected == 0) | (expected == 255)).mean() < 0.5
    assert np.abs(actual - expected).max() <= 1


def test_text_to_image() -> None:
    pipeline = small_pipeline()
    twin = diffusers_pipeline("StableDiffusionPipeline", pipeline)
    assert_same_pixels(ours(pipeline, TextToImage()), theirs(twin, height=32, width=32))


def test_text_to_image_of_sdxl() -> None:
    pipeline = small_pipeline(sdxl_conditioner(), context_dim=32, vector_dim=16 + 6 * SIZE_DIM)
    cond, uncond = pipeline.conditioner.prompt_pair(PROMPTS, [NEGATIVE] * 2, image_size=(32, 32))
    assert cond.vector is not None and uncond.vector is not None
    expected = diffusers_sdxl(pipeline)(
        prompt_embeds=cond.context,
        pooled_prompt_embeds=cond.vector[:, :16],
        negative_prompt_embeds=uncond.context,
        negative_pooled_prompt_embeds=uncond.vector[:, :16],
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=NUM_STEPS,
        guidance_scale=GUIDANCE,
        height=32,
        width=32,
    )
    assert_same_pixels(ours(pipeline, TextToImage()), pixels(expected.images))


def test_text_to_image_that_is_not_square() -> None:
    pipeline = small_pipeline()
    twin = diffusers_pipeline("StableDiffusionPipeline", pipeline)
    orders = TextToImage().orders(PROMPTS[:1], SEEDS[:1], negative_prompt=NEGATIVE)
    images = pipeline.draw(orders, task=TextToImage(), settings=replace(pipeline.settings, image_size=(24, 40)))
    expected = theirs(twin, prompts=PROMPTS[:1], seeds=SEEDS[:1], height=24, width=40)
    assert_same_pixels(pixels(to_pil(images)), expected)


@pytest.mark.parametrize("strength", [0.4, 0.75, 1.0])
def test_image_to_image(strength: float) -> None:
    pipeline = small_pipeline()
    twin = diffusers_pipeline("StableDiffusionImg2ImgPipeline", pipeline)
    expected = theirs(twin, image=[picture()] * 2, strength=strength)
    assert_same_pixels(ours(pipeline, ImageToImage(picture(), strength=strength)), expected)


@pytest.mark.parametrize("in_channels", [4, 9], ids=["any model", "an inpainting model"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpaint(in_channels: int, strength: float) -> None:
    pipeline = small_pipeline(in_channels=in_channels)
    twin = diffusers_pipeline("StableDiffusionInpaintPipeline", pipeline)
    expected = theirs(twin, image=[picture()] * 2, mask_image=[mask()] * 2, strength=strength, height=32, width=32)
    task = Inpaint(picture(), mask(), strength=strength, keep_pixels=False)
    assert_same_pixels(ours(pipeline, task), expected)


@pytest.mark.parametrize("noise_level", [0, 20, 350])
def test_upscale(noise_level: int) -> None:
    pipeline = small_pipeline(in_channels=7, num_classes=1000, latent_scale=0.08333)
    twin = diffusers_pipeline("StableDiffusionUpscalePipeline", pipeline)
    small = picture(16)
    expected = theirs(twin, prompts=PROMPTS[:1], seeds=SEEDS[:1], image=small, noise_level=noise_level)
    task = Upscale(small, noise_level=noise_level)
    assert_same_pixels(ours(pipeline, task, prompts=PROMPTS[:1], seeds=SEEDS[:1]), expected)


def test_image_to_image_with_a_depth_map() -> None:
    pipeline = small_pipeline(in_channels=5)
    twin = diffusers_pipeline("StableDiffusionDepth2ImgPipeline", pipeline)
    depth = picture(seed=1).convert("L")
    levels = torch.from_numpy(np.array(depth, dtype=np.float32))[None].expand(2, -1, -1)
    expected = theirs(twin, image=[picture()] * 2, depth_map=levels, strength=0.8)
    assert_same_pixels(ours(pipeline, ImageToImage(picture(), strength=0.8, depth=depth)), expected)


def test_a_folder_of_diffusers_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = diffusers_pipeline("StableDiffusionPipeline", small_pipeline())
    twin.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    settings = ["sampler=ddim", "discretization=leading", f"steps={NUM_STEPS}", f"guidance.scale={GUIDANCE}"]
    words = [f"prompt={PROMPTS[0]}", f"negative_prompt={NEGATIVE}", "seeds=[3,4]", "image_size=[24,32]"]
    for memory in ("default", "low"):
        choices = ["checkpoint=model", f"memory={memory}", f"out={memory}"]
        assert main(["sample", *choices, *settings, *words]) == 0
    exact, low = (pixels([Image.open(path) for path in sorted(Path(out).glob("0*"))]) for out in ("default", "low"))
    expected = theirs(twin, prompts=PROMPTS[:1] * 2, seeds=[3, 4], height=24, width=32)
    assert_same_pixels(exact, expected)
    assert 0 < np.abs(low - expected).mean() < 4
