import io

import numpy as np
import pytest
import torch
from metric_helpers import Pixels, images
from PIL import Image
from torch.testing import assert_close
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision import transforms

from ldm.metrics import JPEGFeatures, quantize
from ldm.metrics.preprocessing import RESIZERS, jpeg, resize_and_crop, resizer

SIZES = [(32, 299), (512, 299), (299, 299), (300, 224)]


def clean_fid(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Clean-fid's rule by its published formula: Pillow, one float channel at a time, clipped, not rounded."""
    channels = [
        np.asarray(Image.fromarray(channel.numpy(), mode="F").resize((size, size), Image.Resampling.BICUBIC))
        for channel in pixels.flatten(0, 1)
    ]
    return torch.from_numpy(np.stack(channels).clip(0, 255)).view(*pixels.shape[:2], size, size)


@pytest.mark.parametrize(("side", "size"), SIZES)
def test_bicubic_is_clean_fids(side: int, size: int) -> None:
    pixels = quantize(images(2, side=side)).float()
    # Of 255 levels: rounding of float32.
    assert_close(RESIZERS["bicubic"](pixels, size), clean_fid(pixels, size), rtol=0, atol=5e-3)


def test_bicubic_stays_in_range_where_the_filter_overshoots() -> None:
    edges = torch.tensor([0.0, 255.0]).repeat_interleave(8).expand(1, 3, 16, 16)
    resized = RESIZERS["bicubic"](edges, 40)
    assert (resized.min(), resized.max()) == (0, 255)


@pytest.mark.parametrize(("side", "size"), SIZES)
def test_tf1_bilinear_is_torch_fidelitys_bit_for_bit(side: int, size: int) -> None:
    pixels = quantize(images(2, side=side)).float()
    expected = interpolate_bilinear_2d_like_tensorflow1x(pixels, size=(size, size), align_corners=False)
    assert_close(RESIZERS["tf1_bilinear"](pixels, size), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("side", "size"), SIZES)
def test_bilinear_is_pillows_with_its_antialiasing(side: int, size: int) -> None:
    pixels = quantize(images(1, side=side)).float()
    picture = Image.fromarray(pixels[0, 0].numpy(), mode="F").resize((size, size), Image.Resampling.BILINEAR)
    assert_close(RESIZERS["bilinear"](pixels, size)[0, 0].numpy(), np.array(picture), rtol=0, atol=5e-3)


def test_an_unknown_resizing_is_refused() -> None:
    with pytest.raises(ValueError, match="got resize='lanczos', expected one of tf1_bilinear, bicubic, bilinear"):
        resizer("lanczos")


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (33, 50), (20, 20), (32, 40)])
def test_resize_and_crop_is_clips_within_a_level(shape) -> None:
    pictures = images(1, side=64)[:, :, : shape[0], : shape[1]]
    prepare = transforms.Compose(
        [
            transforms.Resize(32, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.PILToTensor(),
        ]
    )
    expected = prepare(Image.fromarray(quantize(pictures)[0].permute(1, 2, 0).numpy()))
    # Where a value lies between two levels, Pillow's fixed-point filter may fall on the other side.
    assert_close(resize_and_crop(pictures, 32)[0], expected.float(), rtol=0, atol=1)


def test_jpeg_is_what_a_file_of_that_quality_holds() -> None:
    picture = images(1, side=40)
    stream = io.BytesIO()
    Image.fromarray(quantize(picture)[0].permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=75)
    expected = torch.from_numpy(np.asarray(Image.open(stream)).copy()).permute(2, 0, 1)
    assert_close(quantize(jpeg(picture, 75))[0], expected)


def test_features_behind_jpeg_are_those_of_the_compressed_images() -> None:
    network = JPEGFeatures(Pixels(8), quality=30)
    assert_close(network(images(2)), Pixels(8)(jpeg(images(2), 30)))
    assert network.describe()["jpeg_quality"] == 30


def test_a_quality_that_jpeg_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="got quality=0, expected 1 to 100"):
        JPEGFeatures(Pixels(), quality=0)
