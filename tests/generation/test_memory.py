"""What saves memory changes pictures little or not at all."""

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from ldm.autoencoders import KLAutoencoder
from ldm.conditioners import CLIPText
from ldm.diffusion import Guidance
from ldm.generation import ImageToImage, Memory, Order, Pipeline
from ldm.generation.memory import MAX_PIXELS, cast_parameters, dtype_of, halve
from ldm.samplers import Euler

MakePipeline = Callable[..., Pipeline]
PROMPTS, SEEDS = ["red seven", "blue"], [0, 1]
CPU = torch.device("cpu")
ONE_GREY_LEVEL = 2 / 255


def types(module: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


def test_half_weights_give_nearly_the_same_picture(make_pipeline: MakePipeline) -> None:
    exact = make_pipeline(sampler=Euler(), guidance=Guidance(scale=2.0)).images(PROMPTS, seeds=SEEDS)
    pipeline = make_pipeline(sampler=Euler(), guidance=Guidance(scale=2.0)).placed(CPU, memory=Memory(), half=True)
    halved = pipeline.images(PROMPTS, seeds=SEEDS)
    for part in (pipeline.denoiser, pipeline.conditioner, pipeline.autoencoder):
        assert types(part) == {torch.bfloat16}
    assert halved.dtype == torch.float32
    error = (halved - exact).abs()
    assert 0 < error.mean() < 3 * ONE_GREY_LEVEL
    # bfloat16 has 8 bits: the error is small beside what the picture shows.
    assert error.square().mean() < 0.01 * exact.var()


def test_half_weights_leave_the_scale_of_latents_and_encoding_exact(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline()
    pipeline.autoencoder.set_latent_scale(0.18215)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    halve(pipeline.denoiser.network, conditioner=pipeline.conditioner, autoencoder=pipeline.autoencoder, device=CPU)
    latents = pipeline.encode(image, None)
    assert dtype_of(pipeline.autoencoder) == torch.bfloat16
    assert pipeline.autoencoder.latent_scale == torch.tensor(0.18215)
    # The weights have 8 bits, and what is computed with them in float32 all of its own.
    cast_parameters(pipeline.autoencoder, torch.float32)
    expected = pipeline.autoencoder.to_latents(pipeline.autoencoder.encode(image), noise=None)
    assert_close(latents, expected)


def test_a_text_encoder_of_transformers_works_in_half(make_pipeline: MakePipeline) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    pipeline = make_pipeline(conditioner=CLIPText(sizes)).placed(CPU, memory=Memory(), half=True)
    assert pipeline.images(["a (red:1.3) seven"], seeds=[0]).isfinite().all()


@pytest.mark.parametrize(("pixels", "slices"), [(4 * 512 * 512, [5]), (2 * 16 * 24 + 1, [2, 2, 1]), (1, [1] * 5)])
def test_no_more_pixels_than_the_bound_are_encoded_or_decoded_at_once(
    pixels: int, slices: list[int], make_pipeline: MakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, seen = make_pipeline(), []
    images, latents = torch.rand(5, 3, 16, 24) * 2 - 1, torch.randn(5, 4, 8, 12)
    encoded, decoded = pipeline.encode(images, None), pipeline.decode(latents)
    for part in (pipeline.autoencoder.encoder, pipeline.autoencoder.decoder):
        part.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr("ldm.generation.memory.MAX_PIXELS", pixels)
    assert_close(pipeline.encode(images, None), encoded)
    assert_close(pipeline.decode(latents), decoded)
    assert seen == slices * 2


def test_four_large_pictures_go_through_the_autoencoder_at_once() -> None:
    assert MAX_PIXELS == 4 * 512 * 512
    with torch.device("meta"):
        autoencoder = KLAutoencoder(base_channels=8, channel_mult=[1, 1, 1, 1], num_res_blocks=1, norm_groups=4)
        latents = torch.randn(64, 4, 64, 64)
    seen: list[int] = []
    autoencoder.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    assert Memory().decode(autoencoder, latents).shape == (64, 3, 512, 512)
    assert seen == [4] * 16


def test_tiles_as_large_as_the_picture_change_nothing(make_pipeline: MakePipeline) -> None:
    exact = make_pipeline().images(PROMPTS, seeds=SEEDS)
    tiled = make_pipeline().placed(CPU, memory=Memory(tile=8)).images(PROMPTS, seeds=SEEDS)
    assert_close(tiled, exact, rtol=0, atol=1e-5)


def test_smaller_tiles_change_the_picture_a_little(make_pipeline: MakePipeline) -> None:
    exact = make_pipeline().images(PROMPTS, seeds=SEEDS, image_size=32)
    tiled = make_pipeline().placed(CPU, memory=Memory(tile=12)).images(PROMPTS, seeds=SEEDS, image_size=32)
    assert tiled.shape == exact.shape
    # Group normalisation sees a tile instead of the picture.
    assert 0 < (tiled - exact).square().mean() < 0.2 * exact.var()


def test_weights_that_wait_outside_the_device_give_the_same_picture(make_pipeline: MakePipeline) -> None:
    task = ImageToImage(Image.effect_noise((16, 16), 60), strength=0.5)
    orders = [Order("red", 3)]
    plain = make_pipeline()
    exact = plain.draw(orders, task=task, settings=plain.settings)
    pipeline = make_pipeline().placed(CPU, memory=Memory(offload=True))
    # Accelerate keeps the weights aside; in their place there is nothing until a layer runs.
    assert {parameter.device.type for parameter in pipeline.denoiser.network.parameters()} == {"meta"}
    assert pipeline.device == CPU
    assert_close(pipeline.draw(orders, task=task, settings=pipeline.settings), exact, rtol=0, atol=1e-5)


def test_all_together(make_pipeline: MakePipeline) -> None:
    exact = make_pipeline(sampler=Euler()).images(PROMPTS, seeds=SEEDS)
    low = make_pipeline(sampler=Euler()).placed(CPU, memory=Memory(tile=64, offload=True), half=True)
    error = (low.images(PROMPTS, seeds=SEEDS, batch_size=1) - exact).abs()
    assert error.square().mean() < 0.01 * exact.var()


def test_a_tile_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^got memory.tile=3, expected at least 4"):
        Memory(tile=3)
