"""One generator a seed: an image depends on its own seed, not on the batch that it is sampled in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SeededNoise:
    """Draws noise (B, *shape), row i from the generator of seeds[i], on the CPU so that devices agree.

    Args:
        seeds: B integers from 0 to 2^32 - 1.
        shape: of one sample, (C, H, W).

    Raises:
        ValueError: a seed out of range, where torch's generator would quietly take it modulo 2^32.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], *, device: torch.device | str = "cpu") -> None:
        for seed in seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"got seed {seed}, expected an integer from 0 to {2**32 - 1}; choose another seed")
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = tuple(shape), device

    def __call__(self) -> Tensor:
        """The next standard normal draw, (B, *shape)."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)
