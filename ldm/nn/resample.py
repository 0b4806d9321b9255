"""Resampling of feature maps by a separable low-pass filter."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resampler(resample: str, taps: Sequence[float] = (1, 1)) -> nn.Module:
    """What leaves a feature map's resolution as it is ("none"), halves it ("down") or doubles it ("up").

    `taps` is one axis of the filter, of even length; [1, 1] averages pixels on the way down and repeats them on the
    way up. Raises ValueError for another word or an odd number of taps.
    """
    if len(taps) % 2 or sum(taps) == 0:
        raise ValueError(f"got the filter {list(taps)}, expected an even number of taps with a sum; use [1, 1]")
    if resample == "none":
        return nn.Identity()
    if resample == "down":
        return nn.AvgPool2d(2) if list(taps) == [1, 1] else FilteredDownsample(taps)
    if resample == "up":
        return nn.Upsample(scale_factor=2.0, mode="nearest") if list(taps) == [1, 1] else FilteredUpsample(taps)
    raise ValueError(f"got resample {resample!r}, expected 'none', 'up' or 'down'; choose one of them")


class FilteredDownsample(nn.Module):
    """(B, C, H, W) to (B, C, H/2, W/2), filtered; beyond the border lies zero, or what `padded` has put there."""

    kernel: Tensor

    def __init__(self, taps: Sequence[float], *, padded: bool = False) -> None:
        super().__init__()
        self.register_buffer("kernel", _kernel(taps), persistent=False)
        self.padding = 0 if padded else border(taps)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample x."""
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, kernel, stride=2, padding=self.padding, groups=x.shape[1])


class FilteredUpsample(nn.Module):
    """(B, C, H, W) to (B, C, 2H, 2W), filtered; beyond the border lies zero."""

    kernel: Tensor

    def __init__(self, taps: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("kernel", 4 * _kernel(taps), persistent=False)
        self.padding = border(taps)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample x."""
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv_transpose2d(x, kernel, stride=2, padding=self.padding, groups=x.shape[1])


def border(taps: Sequence[float]) -> int:
    """Pixels beyond the border that a filter reads when it halves the resolution."""
    return (len(taps) - 1) // 2


def _kernel(taps: Sequence[float]) -> Tensor:
    axis = torch.tensor(taps, dtype=torch.float32) / sum(taps)
    return torch.outer(axis, axis)[None, None]
