"""Layers that keep the expected magnitude (root mean square) of activations at 1, whatever their weights do.

Equation numbers are those of Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models".
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-4


def unit_magnitude(x: Tensor, *, dim: int | tuple[int, ...]) -> Tensor:
    """x over its root mean square along `dim`, taken in float32 or better (eq. 52, 66)."""
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean_square = x.to(precise).square().mean(dim=dim, keepdim=True)
    return x / (mean_square.sqrt() + EPS).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU over its root mean square under normal(0, 1) input, 0.596 (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, *, balance: float) -> Tensor:
    """(1 - balance) a + balance b at the magnitude of either, when they are uncorrelated (eq. 88)."""
    return torch.lerp(a, b, balance) / math.hypot(1 - balance, balance)


def mp_cat(a: Tensor, b: Tensor, *, balance: float = 0.5) -> Tensor:
    """a (B, C_a, H, W) and b (B, C_b, H, W) on channels, contributing as 1 - balance to balance whatever C_a and C_b.

    The magnitude of the whole is that of either (eq. 103).
    """
    channels_a, channels_b = a.shape[1], b.shape[1]
    scale = math.sqrt(channels_a + channels_b) / math.hypot(1 - balance, balance)
    weight_a, weight_b = (1 - balance) / math.sqrt(channels_a), balance / math.sqrt(channels_b)
    return torch.cat([scale * weight_a * a, scale * weight_b * b], dim=1)


class MPFourier(nn.Module):
    """Scalars (B,) to (B, dim): sqrt(2) cos(2 pi (f t + phi)), f normal(0, 1) and phi in [0, 1) drawn once (eq. 75)."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(dim))
        self.register_buffer("phases", torch.rand(dim))

    def forward(self, t: Tensor) -> Tensor:
        """Embed t in float32, or float64 when it is."""
        dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
        turns = t.to(dtype)[:, None] * self.frequencies.to(dtype) + self.phases.to(dtype)
        return math.sqrt(2) * torch.cos(2 * math.pi * turns)


class UnitWeight(nn.Module):
    """A weight whose rows, one for each output, act at magnitude 1 / sqrt(inputs) whatever their length (eq. 47).

    The stored rows must be brought back to magnitude 1 after every optimizer step, by `normalize_weights`: otherwise
    they grow, and the learning rate that they feel falls (eq. 66, forced weight normalisation).
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))

    def acting_weight(self, gain: Tensor | float, dtype: torch.dtype) -> Tensor:
        """The weight that is multiplied with, in the given dtype; its gradient is orthogonal to the stored rows."""
        rows = tuple(range(1, self.weight.ndim))
        unit = unit_magnitude(self.weight, dim=rows)
        return (unit * (gain / math.sqrt(self.weight[0].numel()))).to(dtype)


class MPLinear(UnitWeight):
    """Linear layer without offset: (B, dim_in) to (B, dim_out), at unchanged magnitude times `gain`."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_out, dim_in)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Map x."""
        return F.linear(x, self.acting_weight(gain, x.dtype))


class MPConv(UnitWeight):
    """Convolution without offset: (B, C_in, H, W) to (B, C_out, H, W), at unchanged magnitude times `gain`."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(out_channels, in_channels, kernel, kernel)
        self.padding = kernel // 2

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Convolve x."""
        return F.conv2d(x, self.acting_weight(gain, x.dtype), padding=self.padding)


@torch.no_grad()
def normalize_weights(module: nn.Module) -> None:
    """Bring every row of every `UnitWeight` within the module back to magnitude 1, in place (eq. 66)."""
    for layer in module.modules():
        if isinstance(layer, UnitWeight):
            # Spread over devices by FSDP2, a weight has whole rows on each.
            weight = layer.weight.to_local() if hasattr(layer.weight, "to_local") else layer.weight
            weight.copy_(unit_magnitude(weight, dim=tuple(range(1, weight.ndim))))
