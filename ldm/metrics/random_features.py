"""A feature network of random weights: stands in where the real one is too much, as in `+scale=tiny`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Pixels a side: below, a single position is left, of which there is no standard deviation.
SMALLEST = 8


class RandomFeatures(nn.Module):
    """Two convolutions and a linear layer of seeded random weights: its figures compare with nothing but each other.

    Args:
        num_features: of an image.
        seed: of the weights.
    """

    def __init__(self, num_features: int = 16, *, seed: int = 0) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"got num_features={num_features}, expected at least 1")
        self.num_features, self.seed = num_features, seed
        generator = torch.Generator().manual_seed(seed)
        shapes = {"first": (8, 3, 4, 4), "second": (16, 8, 4, 4), "last": (num_features, 32)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.randn(shape, generator=generator) * 0.2, persistent=False)

    first: Tensor
    second: Tensor
    last: Tensor

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol: that it is a stand-in."""
        return {"network": "ldm.metrics.RandomFeatures", "num_features": self.num_features, "seed": self.seed}

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, num_features) of images (B, 3, H, W) in [-1, 1], each side at least 8 pixels.

        Raises:
            ValueError: a smaller image, which has no spread of what the convolutions find.
        """
        if min(images.shape[2:]) < SMALLEST:
            raise ValueError(
                f"got images {tuple(images.shape)}, expected sides of at least {SMALLEST} pixels; give larger ones"
            )
        x = torch.relu(nn.functional.conv2d(images, self.first, stride=2, padding=1))
        x = torch.relu(nn.functional.conv2d(x, self.second, stride=2, padding=1)).flatten(2)
        return torch.cat([x.mean(2), x.std(2)], dim=1) @ self.last.T
