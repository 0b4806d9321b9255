"""What may be done to finished pictures: each step takes and gives (H, W, 3) float32 in [0, 1].

All of it is scikit-image's, which is imported where it is used: it takes a second.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from ldm.generation.pictures import Source, read_picture

Pixels = NDArray[np.float32]
Retouch = Callable[[Pixels], Pixels]


class NormalizeIntensity:
    """Stretches the values between two percentiles over [0, 1], all channels alike, so that colours keep their hue.

    Args:
        low, high: percentiles; what lies outside is clipped.
    """

    def __init__(self, *, low: float = 0.5, high: float = 99.5) -> None:
        if not 0 <= low < high <= 100:
            raise ValueError(f"got low={low:g}, high={high:g}, expected percentiles 0 <= low < high <= 100")
        self.low, self.high = low, high

    def __call__(self, pixels: Pixels) -> Pixels:
        from skimage.exposure import rescale_intensity

        ends = tuple(np.percentile(pixels, (self.low, self.high)))
        if ends[0] == ends[1]:
            return pixels
        return rescale_intensity(pixels, in_range=ends, out_range=(0.0, 1.0)).astype(np.float32)


class Denoise:
    """Non-local means: averages patches that look alike (Buades et al. 2005).

    Args:
        noise: standard deviation of the noise to take away, as a share of the range.
    """

    def __init__(self, *, noise: float = 0.03) -> None:
        if not 0 < noise < 1:
            raise ValueError(f"got noise={noise:g}, expected a share of the range between 0 and 1")
        self.noise = noise

    def __call__(self, pixels: Pixels) -> Pixels:
        from skimage.restoration import denoise_nl_means

        smooth = denoise_nl_means(
            pixels, patch_size=5, patch_distance=6, h=0.8 * self.noise, sigma=self.noise, channel_axis=2
        )
        return smooth.clip(0, 1).astype(np.float32)


class MatchColor:
    """Gives each channel of CIE Lab the mean and standard deviation that it has in a reference (Reinhard et al. 2001).

    Args:
        reference: a picture or its file.
    """

    def __init__(self, reference: Source) -> None:
        from skimage.color import rgb2lab

        self.mean, self.std = _statistics(rgb2lab(_to_pixels(read_picture(reference, name="reference"))))

    def __call__(self, pixels: Pixels) -> Pixels:
        from skimage.color import lab2rgb, rgb2lab

        lab = rgb2lab(pixels)
        mean, std = _statistics(lab)
        # The floor, far below what can be seen, is for pictures of one colour.
        matched = (lab - mean) / np.maximum(std, 1e-2) * self.std + self.mean
        with warnings.catch_warnings():
            # Colours that no screen shows are clipped on purpose.
            warnings.filterwarnings(
                "ignore", message="Conversion from CIE-LAB.* negative Z values", category=UserWarning
            )
            return lab2rgb(matched).clip(0, 1).astype(np.float32)


class Sharpen:
    """Unsharp mask: adds `amount` times what a Gaussian blur of `radius` pixels takes away."""

    def __init__(self, *, radius: float = 1.0, amount: float = 1.0) -> None:
        if radius <= 0 or amount <= 0:
            raise ValueError(f"got radius={radius:g}, amount={amount:g}, expected positive numbers")
        self.radius, self.amount = radius, amount

    def __call__(self, pixels: Pixels) -> Pixels:
        from skimage.filters import unsharp_mask

        # Not -1, which scikit-image 0.26 takes for the first axis: most of the result is then left unwritten.
        sharp: Pixels = unsharp_mask(pixels, radius=self.radius, amount=self.amount, channel_axis=2).astype(np.float32)
        return sharp


def retouched(picture: Image.Image, steps: Sequence[Retouch]) -> Image.Image:
    """A picture after all the steps, one after the other; itself where there are none."""
    if not steps:
        return picture
    pixels = _to_pixels(picture)
    for step in steps:
        pixels = step(pixels)
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))


def _to_pixels(picture: Image.Image) -> Pixels:
    return np.asarray(picture, dtype=np.float32) / np.float32(255)


def _statistics(lab: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation (3,) of the channels."""
    values = rearrange(lab, "h w c -> (h w) c").astype(np.float64)
    return values.mean(0), values.std(0)
