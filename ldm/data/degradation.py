"""Small pictures for training to upscale: scaled down, or degraded as cameras and the web do."""

import io
from collections.abc import Mapping, Sequence
from math import cos, pi, sin
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.draws import Draws
from ldm.data.geometry import Geometry

KINDS = ("bicubic", "bsr")
FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX)
STEPS = ("blur", "second blur", "resize", "noise", "jpeg")


class LowResolution:
    """Makes `low_res` (3, h, w), the picture at a fraction of its size.

    `bicubic` is antialiased. `bsr` takes, in random order, two blurs by Gaussians of random width, proportions and
    direction, a change of size by a random filter, Gaussian noise of the sensor and JPEG compression, and scales down
    at last (after Zhang et al. 2021; Rombach et al. 2022, section D.6.1).

    Args:
        factor: of both sides; a power of two that the sides divide by.
        kind: bicubic or bsr.
        max_blur: of the blurs' standard deviation, in pixels of the small picture.
        max_noise: standard deviation of the noise in levels of 255.
        quality: (least, most) of the JPEGs.

    Raises:
        ValueError: a word or number out of range.
    """

    columns: Sequence[str] = ()

    def __init__(
        self,
        factor: int = 4,
        *,
        kind: str = "bicubic",
        max_blur: float = 1.5,
        max_noise: float = 25.0,
        quality: tuple[int, int] = (30, 95),
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"derive.kind: got {kind!r}, expected one of {list(KINDS)}")
        if factor < 2 or factor & (factor - 1):
            raise ValueError(f"derive.factor: got {factor}, expected a power of two")
        if max_blur <= 0 or max_noise < 0 or not 1 <= quality[0] <= quality[1] <= 100:
            raise ValueError(f"derive: got max_blur={max_blur}, max_noise={max_noise}, quality={list(quality)}")
        self.factor, self.kind = factor, kind
        self.max_blur, self.max_noise, self.quality = max_blur, max_noise, (quality[0], quality[1])

    def __call__(
        self, pixels: np.ndarray, *, row: Mapping[str, Any], geometry: Geometry, draws: Draws
    ) -> dict[str, np.ndarray]:
        """Return `low_res`, uint8 (h, w, 3); raises ValueError for sides that do not divide by the factor."""
        height, width = pixels.shape[:2]
        if height % self.factor or width % self.factor:
            raise ValueError(f"got {width} x {height} pixels, expected multiples of derive.factor={self.factor}")
        size = width // self.factor, height // self.factor
        image = Image.fromarray(np.ascontiguousarray(pixels))
        if self.kind == "bicubic":
            return {"low_res": np.asarray(image.resize(size, Image.Resampling.BICUBIC))}
        for step in np.argsort(draws.uniforms(len(STEPS)), kind="stable").tolist():
            image = self._applied(STEPS[step], image, size, draws)
        return {"low_res": np.asarray(image.resize(size, FILTERS[draws.integer(0, len(FILTERS) - 1)]))}

    def _applied(self, step: str, image: Image.Image, size: tuple[int, int], draws: Draws) -> Image.Image:
        if step == "resize":
            return self._resized(image, size, draws)
        if step == "noise":
            level = draws.uniform(1.0, max(1.0, self.max_noise))
            pixels = np.asarray(image, dtype=np.float32)
            noisy = pixels + level * draws.normals(pixels.shape)
            return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))
        if step == "jpeg":
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=draws.integer(*self.quality))
            return Image.open(stream).convert("RGB")
        scale = image.width / size[0]
        return blurred(image, [draws.uniform(0.1, self.max_blur) * scale for _ in range(2)], draws.uniform(0, pi))

    def _resized(self, image: Image.Image, size: tuple[int, int], draws: Draws) -> Image.Image:
        """Scale to a random size between the small picture's and one and a half of the image's own, at most."""
        share = draws.uniform(1.0 / self.factor, 1.5)
        sides = [max(part, round(side * share)) for part, side in zip(size, image.size, strict=True)]
        return image.resize((sides[0], sides[1]), FILTERS[draws.integer(0, len(FILTERS) - 1)])


def blurred(image: Image.Image, widths: Sequence[float], angle: float) -> Image.Image:
    """Convolve an RGB image with a Gaussian of two standard deviations in pixels, turned by `angle` in radians."""
    import torch

    reach = max(1, int(2.5 * max(widths)))
    axis = np.arange(-reach, reach + 1, dtype=np.float64)
    x, y = np.meshgrid(axis, axis)
    along, across = cos(angle) * x + sin(angle) * y, cos(angle) * y - sin(angle) * x
    kernel = np.exp(-0.5 * ((along / widths[0]) ** 2 + (across / widths[1]) ** 2))
    weight = torch.from_numpy((kernel / kernel.sum()).astype(np.float32)).expand(3, 1, -1, -1)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    padded = torch.nn.functional.pad(pixels, [min(reach, side - 1) for side in image.size for _ in range(2)], "reflect")
    short = [reach - min(reach, side - 1) for side in image.size]
    padded = torch.nn.functional.pad(padded, [pad for pad in short for _ in range(2)], "replicate")
    smooth = torch.nn.functional.conv2d(padded, weight, groups=3)[0].permute(1, 2, 0)
    return Image.fromarray(smooth.round().clamp(0, 255).to(torch.uint8).numpy())
