"""Inpainting, upscaling and layout models train on what the data make of pictures, and their tasks sample from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from tiny_models import fill, latent_diffusion_module, tiny_autoencoder, tiny_conditioner, tiny_denoiser

from ldm.conditioners import Combined, Conditioner, Layout, LowResolution, MaskedImage
from ldm.data import Record, ShardDataModule, write_shards
from ldm.data.buckets import Buckets
from ldm.data.degradation import LowResolution as SmallPictures
from ldm.data.layout import Boxes
from ldm.data.masks import RandomMask
from ldm.diffusion import Denoiser
from ldm.generation import Inpaint, Order, TextToImage, Upscale
from ldm.networks import UNet


def denoiser(**options: Any) -> Denoiser:
    geometry = {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2]}
    network = UNet(**({"out_channels": 4, "num_heads": 2, "norm_groups": 4, **geometry} | options))
    fill(network)
    plain = tiny_denoiser()
    return Denoiser(
        network,
        schedule=plain.schedule,
        parameterization=plain.parameterization,
        weighting=plain.weighting,
        times=plain.times,
    )


def layout() -> Layout:
    conditioner = Layout(8, 1, vocabulary_size=101, max_boxes=2, heads=2, head_dim=4)
    fill(conditioner)
    return conditioner


def write_pictures(folder: Path) -> Path:
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(8)]
    write_shards(folder, [Record(p, "red", {"boxes": [[3, 0.1, 0.1, 0.6, 0.7]]}) for p in pictures])
    return folder


CASES: dict[str, tuple[Callable[[], Conditioner], dict[str, Any], Any, Any]] = {
    "inpainting with text": (
        lambda: Combined([tiny_conditioner(), MaskedImage()]),
        {"in_channels": 9, "context_dim": 8},
        RandomMask(),
        lambda picture: {"prompt": "red", "task": Inpaint(picture, Image.new("L", (16, 16), 255))},
    ),
    "inpainting without": (
        lambda: MaskedImage("latent_diffusion"),
        {"in_channels": 9},
        RandomMask(),
        lambda picture: {"prompt": "", "task": Inpaint(picture, Image.new("L", (16, 16), 255))},
    ),
    "upscaling with text and noise": (
        lambda: Combined([tiny_conditioner(), LowResolution(350)]),
        {"in_channels": 7, "context_dim": 8, "num_classes": 1000},
        SmallPictures(2),
        lambda picture: {"prompt": "red", "task": Upscale(picture.resize((8, 8)))},
    ),
    "upscaling without": (
        lambda: LowResolution(),
        {"in_channels": 7},
        SmallPictures(2, kind="bsr"),
        lambda picture: {"prompt": "", "task": Upscale(picture.resize((8, 8)))},
    ),
    "layout": (
        layout,
        {"in_channels": 4, "context_dim": 8},
        Boxes(max_boxes=2),
        lambda picture: {"prompt": "[[3, 0, 0, 1, 1]]"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_trains_on_what_is_derived_and_its_task_samples(
    case: str, tmp_path: Path, make_trainer: Callable[..., pl.Trainer], losses: Any
) -> None:
    make_conditioner, network, derive, order = CASES[case]
    torch.manual_seed(0)
    module = latent_diffusion_module(
        denoiser=denoiser(**network), conditioner=make_conditioner(), condition_dropout=0.3
    )
    folder = write_pictures(tmp_path / "pictures")
    data = ShardDataModule(folder, folder, batch_size=4, resolution=16, derive=derive)
    make_trainer(max_steps=2, callbacks=[losses]).fit(module, data)
    assert all(np.isfinite(row["train/loss"]) for row in losses.rows) and len(losses.rows) == 2
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    settings = {"task": TextToImage(), **order(picture)}
    orders = [Order(settings["prompt"], seed=0)]
    images = module.pipeline().draw(orders, task=settings["task"], settings=module.sampling)
    assert images.shape == (1, 3, 16, 16) and images.isfinite().all()


def test_dropout_takes_the_text_and_leaves_the_picture() -> None:
    conditioner = Combined([tiny_conditioner(), MaskedImage()])
    module = latent_diffusion_module(denoiser=denoiser(in_channels=9, context_dim=8), conditioner=conditioner)
    seen = []
    module.trained.denoiser.network.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    random = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.rand(2, 3, 16, 16, generator=random),
        "mask": torch.ones(2, 1, 16, 16),
        "caption": ["red", "blue"],
        "position": torch.tensor([0, 1]),
    }
    for dropout in (0.0, 1.0):
        module.loss(batch, module.trained, 7, dropout)
    told, dropped = seen
    assert torch.equal(told.concat, dropped.concat)
    torch.testing.assert_close(dropped.context, tiny_conditioner().null(2).context)
    assert not torch.equal(told.context, dropped.context)


def test_training_tells_what_the_task_tells() -> None:
    """The same picture, mask and noise in both: the channels that the network is told agree."""
    autoencoder = tiny_autoencoder()
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    from ldm.generation.inpaint import _what_is_told

    class Encoder:
        def encode(self, picture: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
            return autoencoder.to_latents(autoencoder.encode(picture), noise=noise)

    for convention, noise in (("stable_diffusion", torch.randn(1, 4, 8, 8)), ("latent_diffusion", None)):
        conditioner = MaskedImage(convention)
        (masked,) = conditioner.pictures({"image": image, "mask": mask}).values()
        latents = Encoder().encode(masked, noise)
        told = conditioner({"mask": mask, "masked_image_latents": latents}).concat
        torch.testing.assert_close(told, _what_is_told(Encoder(), image, mask, noise))  # type: ignore[arg-type]


def test_buckets_that_the_model_does_not_divide_are_refused(
    tmp_path: Path, make_trainer: Callable[..., pl.Trainer]
) -> None:
    data = ShardDataModule(
        write_pictures(tmp_path / "p"), batch_size=1, resolution=16, buckets=Buckets([[16, 16], [12, 18]])
    )
    with pytest.raises(ValueError, match=r"^got data\.buckets with 12 x 18, expected multiples of 4"):
        make_trainer(max_steps=1).fit(latent_diffusion_module(), data)


def test_a_model_trains_on_batches_of_several_sizes(
    tmp_path: Path, make_trainer: Callable[..., pl.Trainer], losses: Any
) -> None:
    random = np.random.default_rng(0)
    shapes = [(16, 24), (24, 16)]
    records = [Record(random.integers(0, 256, (*shapes[i % 2], 3), dtype=np.uint8), "red") for i in range(12)]
    write_shards(tmp_path / "p", records)
    data = ShardDataModule(tmp_path / "p", batch_size=2, resolution=16, buckets=Buckets([[16, 24], [24, 16]]))
    make_trainer(max_steps=4, callbacks=[losses]).fit(latent_diffusion_module(), data)
    assert len(losses.rows) == 4
