"""One generator a seed: an image depends on its own seed, not on the batch that it is sampled in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Below this angle (radians) a great circle is a straight line, and the formula of the circle divides by zero.
SMALLEST_ANGLE = 1e-4


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
        return self.draw(self.shape)

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next draw, of another shape: (B, *shape)."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self.generators]).to(self.device)


class BlendedNoise(SeededNoise):
    """Noise on the way from the noise of one seed to that of another: every draw is a `slerp` of theirs.

    Args:
        seeds, other_seeds: B integers each.
        amounts: B numbers; 0 is the noise of seeds[i], 1 that of other_seeds[i].
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Sequence[int],
        *,
        other_seeds: Sequence[int],
        amounts: Sequence[float],
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(seeds, shape, device=device)
        self.other = SeededNoise(other_seeds, shape, device=device)
        self.amounts = torch.tensor(amounts, device=device)

    def draw(self, shape: Sequence[int]) -> Tensor:
        return slerp(super().draw(shape), self.other.draw(shape), self.amounts)


def slerp(start: Tensor, end: Tensor, amounts: Tensor) -> Tensor:
    """Interpolates on the great circle: sin((1 - a) w) / sin w start + sin(a w) / sin w end, w the angle between them.

    A straight line between two draws of noise passes through shorter vectors, which no schedule expects; the circle
    keeps their length (Shoemake 1985; White 2016, section 2.1).

    Args:
        start, end: (B, ...).
        amounts: (B,), 0 gives start and 1 gives end.
    """
    a, b = start.flatten(1).double(), end.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)
    angle = torch.acos(cosine)[:, None]
    part = amounts.double()[:, None]
    circle = (torch.sin((1 - part) * angle) * a + torch.sin(part * angle) * b) / torch.sin(angle)
    mixed = torch.where(torch.sin(angle).abs() < SMALLEST_ANGLE, torch.lerp(a, b, part), circle)
    return mixed.view_as(start).to(start.dtype)
