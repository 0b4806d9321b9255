"""Randomness that belongs to a sample, not to a process: the same on any number of devices, and after a resume."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Draw:
    """The random numbers of one batch of diffusion training.

    Args:
        eps: (B, C, H, W) standard normal, the noise to be predicted.
        posterior: (B, C, H, W) standard normal, for the autoencoder's sample.
        u: (B,) in (0, 1), low-discrepancy over consecutive positions, for the training times.
        drop: (B,) in [0, 1), for condition dropout.
    """

    eps: Tensor
    posterior: Tensor
    u: Tensor
    drop: Tensor


def draw(seed: int, positions: Tensor, shape: Sequence[int]) -> Draw:
    """Draws for the samples at `positions` (B,) of the run's stream, each from a generator of its own.

    Times follow the golden-ratio sequence u = frac(offset + position * phi), which covers (0, 1) evenly in any run of
    consecutive positions, as the low-discrepancy sampler of Kingma et al. 2021 does over a batch.

    Args:
        shape: (C, H, W) of one latent.
    """
    eps, posterior, drop = [], [], []
    for position in positions.tolist():
        generator = generator_for(seed, position)
        eps.append(torch.randn(tuple(shape), generator=generator))
        posterior.append(torch.randn(tuple(shape), generator=generator))
        drop.append(torch.rand((), generator=generator))
    offset = torch.rand((), generator=generator_for(seed, -1), dtype=torch.float64)
    u = (offset + positions.double().cpu() * GOLDEN).remainder(1.0).clamp(1e-6, 1 - 1e-6).float()
    device = positions.device
    return Draw(
        torch.stack(eps).to(device), torch.stack(posterior).to(device), u.to(device), torch.stack(drop).to(device)
    )


def normal(seed: int, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape) for the samples at `positions` (B,), each from a generator of its own."""
    noise = [torch.randn(tuple(shape), generator=generator_for(seed, position)) for position in positions.tolist()]
    return torch.stack(noise).to(positions.device)


def uniform(seed: int, positions: Tensor, num: int) -> Tensor:
    """Uniform numbers (B, num) in [0, 1) for the samples at `positions` (B,), each from a generator of its own."""
    numbers = [torch.rand(num, generator=generator_for(seed, position)) for position in positions.tolist()]
    return torch.stack(numbers).to(positions.device)


def generator_for(seed: int, position: int) -> torch.Generator:
    """A generator for one position of one run; neighbouring positions share nothing."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
