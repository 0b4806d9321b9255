import numpy as np
import pytest
import torch
from metric_helpers import images
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.testing import assert_close

from ldm.metrics import ReconstructionQuality, quantize


def measure(pictures: torch.Tensor, originals: torch.Tensor) -> dict[str, float]:
    metric = ReconstructionQuality()
    metric.update(pictures, originals)
    return {name: value.item() for name, value in metric.compute().items()}


def test_values_equal_scikit_images_image_by_image() -> None:
    originals = images(5, seed=0, side=24)
    pictures = originals * 0.7 + images(5, seed=1, side=24) * 0.3
    pairs = [
        (a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy())
        for a, b in zip(quantize(pictures), quantize(originals), strict=True)
    ]
    noise = [peak_signal_noise_ratio(b, a, data_range=255) for a, b in pairs]
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    alike = [structural_similarity(a, b, data_range=255, channel_axis=2, **window) for a, b in pairs]
    expected = {"psnr": np.mean(noise), "psnr_std": np.std(noise), "ssim": np.mean(alike), "ssim_std": np.std(alike)}
    assert_close(measure(pictures, originals), {name: float(v) for name, v in expected.items()}, rtol=1e-6, atol=0)


def test_an_error_of_one_level_has_the_closed_form() -> None:
    originals = torch.full((3, 3, 16, 16), 100 / 127.5 - 1)
    assert_close(measure(originals + 1 / 127.5, originals)["psnr"], 20 * np.log10(255))


def test_identical_images_score_ideal() -> None:
    report = measure(images(3), images(3))
    assert (report["psnr"], report["ssim"]) == (100, pytest.approx(1))


def test_pixels_beyond_the_range_count_as_clamped() -> None:
    assert measure(images(3) * 1.5, images(3)) == measure((images(3) * 1.5).clamp(-1, 1), images(3))


@pytest.mark.parametrize("pair", [(images(2), images(3)), (images(2, side=8), images(2, side=8))])
def test_images_that_cannot_be_compared_are_refused(pair) -> None:
    with pytest.raises(ValueError, match="expected one shape of at least 11 x 11"):
        measure(*pair)
