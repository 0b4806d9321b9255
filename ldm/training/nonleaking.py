"""Augmentation that does not leak into what is generated: the network is told how each picture was changed.

Source: Karras et al. 2022, appendix F.2 and table 6, on the transformations of Karras et al. 2020 (StyleGAN2-ADA).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# The low-pass filter of the wavelet sym6 (Daubechies 1992, table 6.3), whose square is 1.
SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
)
DELAY = len(SYM6) // 2 - 1
MARGIN = 3  # pixels that the filter needs beyond an edge


class NonLeakingAugmentation:
    """Mirrors, scales, rotates, stretches and moves pictures, and says how: nine labels each, zero for unchanged ones.

    Labels: mirrored left to right, and top to bottom (0 or 1); the logarithm of the scale; cos - 1 and sin of the
    rotation; the stretch's size times cos and sin of its direction; the move to the right and down. Logarithms and
    moves are in units of their standard deviations. All are zero at sampling, where nothing is augmented.

    Args:
        probability: of each transformation but the first, which is always drawn: half of all pictures are mirrored.
        scale, stretch: standard deviations of the base-2 logarithms of scale and stretch.
        move: standard deviation of a move, in pictures.
    """

    num_labels = 9
    num_uniforms = 14

    def __init__(self, *, probability: float, scale: float = 0.2, stretch: float = 0.2, move: float = 0.125) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"got nonleaking.probability={probability}, expected a share from 0 to 1")
        self.probability, self.scale, self.stretch, self.move = probability, scale, stretch, move

    def __call__(self, images: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """(pictures (B, C, H, W), labels (B, 9)) from pictures and independent uniform numbers u (B, 14) in (0, 1)."""
        on = (u[:, :5] < self.probability).to(u)
        normal = torch.special.ndtri(u[:, 5:10].clamp(1e-6, 1 - 1e-6))
        angle = (2 * u[:, 10:12] - 1) * math.pi
        mirrored, upside_down = (u[:, 12] < 0.5).to(u), on[:, 0] * (u[:, 13] < 0.5)
        size, rotation, amount = on[:, 1] * normal[:, 0], on[:, 2] * angle[:, 0], on[:, 3] * normal[:, 1]
        right, down = on[:, 4] * normal[:, 2], on[:, 4] * normal[:, 3]
        columns = [mirrored, upside_down, size, rotation.cos() - 1, rotation.sin()]
        columns += [amount * angle[:, 1].cos(), amount * angle[:, 1].sin(), right, down]

        images = torch.where(_like(mirrored, images), images.flip(3), images)
        images = torch.where(_like(upside_down, images), images.flip(2), images)
        height, width = images.shape[-2:]
        back = _moved(-self.move * right * width, -self.move * down * height)
        for matrix in (self._unstretched(amount, angle[:, 1]), _rotated(-rotation), _scaled(2 ** (-self.scale * size))):
            back = matrix @ back
        changed = on[:, 1:].any(1)
        images = torch.where(_like(changed, images), warped(images, back), images)
        return images, torch.stack(columns, dim=1)

    def _unstretched(self, amount: Tensor, direction: Tensor) -> Tensor:
        """Undoes a stretch along the direction, which shrinks across it."""
        factor = 2 ** (self.stretch * amount)
        return _rotated(direction) @ _scaled(1 / factor, factor) @ _rotated(-direction)


def warped(images: Tensor, back: Tensor) -> Tensor:
    """Pictures (B, C, H, W) that show at each place what was at `back` (B, 3, 3) of it, in pixels from the centre.

    At twice the resolution, between filters that give a picture back as it was where nothing moves. Beyond their edges
    pictures go on as in a mirror.
    """
    height, width = images.shape[-2:]
    large = _upsampled(_mirrored(_mirrored(images, 2), 3))
    rows, columns = ((torch.arange(2 * (n + 2 * MARGIN), device=images.device) + 0.5) / 2 for n in (height, width))
    y, x = torch.meshgrid(rows - height / 2 - MARGIN, columns - width / 2 - MARGIN, indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)], dim=-1).to(images)
    places = torch.einsum("b i j, h w j -> b h w i", back[:, :2].to(images), places)
    places = places / places.new_tensor([width / 2, height / 2])
    return _downsampled(F.grid_sample(large, places, mode="bilinear", padding_mode="reflection", align_corners=False))


def _mirrored(x: Tensor, axis: int) -> Tensor:
    """x with MARGIN more on both sides of an axis, as in a mirror at its edges."""
    n = x.shape[axis]
    place = torch.arange(-MARGIN, n + MARGIN, device=x.device).remainder(2 * n)
    return x.index_select(axis, torch.minimum(place, 2 * n - 1 - place))


def _upsampled(x: Tensor) -> Tensor:
    """(B, C, H + 2 MARGIN, W + 2 MARGIN) to (B, C, 2H, 2W), of the same mean."""
    filtered = rearrange(x, "b c h w -> (b c) 1 h w")
    for axis in (2, 3):
        filtered = F.conv_transpose2d(filtered, _taps(x, axis) * 2**0.5, stride=_along(axis, 2, 1))
    first = 2 * MARGIN + DELAY
    cut = filtered[..., first : first + 2 * x.shape[2] - 4 * MARGIN, first : first + 2 * x.shape[3] - 4 * MARGIN]
    return rearrange(cut, "(b c) 1 h w -> b c h w", c=x.shape[1])


def _downsampled(x: Tensor) -> Tensor:
    """The inverse, of (B, C, 2H, 2W) with 2 MARGIN more on each side."""
    first = 2 * MARGIN - DELAY
    filtered = rearrange(x[..., first:, first:], "b c h w -> (b c) 1 h w")
    for axis in (2, 3):
        filtered = F.conv2d(filtered, _taps(x, axis) / 2**0.5, stride=_along(axis, 2, 1))
    return rearrange(filtered, "(b c) 1 h w -> b c h w", c=x.shape[1])


def _taps(x: Tensor, axis: int) -> Tensor:
    return x.new_tensor(SYM6).view(1, 1, *_along(axis, len(SYM6), 1))


def _along(axis: int, this: int, other: int) -> tuple[int, int]:
    return (this, other) if axis == 2 else (other, this)


def _like(flag: Tensor, images: Tensor) -> Tensor:
    return flag.bool().view(-1, *[1] * (images.dim() - 1))


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _scaled(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Matrices (B, 3, 3) that scale by (B,) factors."""
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix([[x, zero, zero], [zero, x if y is None else y, zero], [zero, zero, one]])


def _rotated(angle: Tensor) -> Tensor:
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    cos, sin = angle.cos(), angle.sin()
    return _matrix([[cos, -sin, zero], [sin, cos, zero], [zero, zero, one]])


def _moved(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix([[one, zero, x], [zero, one, y], [zero, zero, one]])
