"""Sinusoidal embeddings of scalars."""

import math

import torch
from torch import Tensor


def timestep_embedding(t: Tensor, dim: int, *, max_period: float = 10_000.0) -> Tensor:
    """Embed scalars t (B,) as (B, dim): cosines first, then sines, of max_period^(-i/half) t, with half = dim/2.

    Gives float64 for float64 input and float32 otherwise. Raises ValueError for an odd or non-positive dim.
    Source: Vaswani et al. 2017 in the variant of Dhariwal and Nichol 2021 (half, not half - 1, in the exponent).
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"got an embedding of width {dim}, expected an even width; use one cosine and one sine a pair")
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    half = dim // 2
    exponents = torch.arange(half, dtype=dtype, device=t.device) / half
    angles = t.to(dtype)[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
