"""Embeddings of a noise level, as the U-Nets of score-based models take them."""

import math

import torch
from torch import Tensor, nn


class SinusoidalLevels(nn.Module):
    """Levels (B,) to (B, dim), sines first: frequencies fall geometrically from 1 to exactly 1 / 10000.

    Unlike `timestep_embedding` the last frequency is reached. Raises ValueError unless dim is even and at least 4.
    Source: Ho et al. 2020; Song et al. 2021 (DDPM++).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        _check_even(dim, at_least=4)
        self.dim = dim

    def forward(self, level: Tensor) -> Tensor:
        """Embed the levels in float32, or float64 when they are."""
        half = self.dim // 2
        exponents = torch.arange(half, dtype=_precise(level), device=level.device) / (half - 1)
        angles = level.to(exponents.dtype)[:, None] * torch.exp(-math.log(10_000.0) * exponents)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class FourierLevels(nn.Module):
    """Levels (B,) to (B, dim), sines first, at fixed random frequencies normal(0, scale).

    To save memory, run it under autocast: cast to half precision, the frequencies would be others.
    Raises ValueError unless dim is even. Source: Tancik et al. 2020; Song et al. 2021 (NCSN++).
    """

    frequencies: Tensor

    def __init__(self, dim: int, *, scale: float = 16.0) -> None:
        super().__init__()
        _check_even(dim, at_least=2)
        self.register_buffer("frequencies", scale * torch.randn(dim // 2))

    def forward(self, level: Tensor) -> Tensor:
        """Embed the levels in float32, or float64 when they are."""
        dtype = _precise(level)
        angles = 2 * math.pi * level.to(dtype)[:, None] * self.frequencies.to(dtype)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _precise(level: Tensor) -> torch.dtype:
    return torch.float64 if level.dtype == torch.float64 else torch.float32


def _check_even(dim: int, *, at_least: int) -> None:
    if dim < at_least or dim % 2:
        raise ValueError(
            f"got an embedding of width {dim}, expected an even width of {at_least} or more; change time_channels"
        )
