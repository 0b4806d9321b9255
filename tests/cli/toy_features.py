"""A feature network that needs no weights."""

from typing import Any

import torch
from torch import Tensor, nn


class MeanColour(nn.Module):
    """The mean and the spread of each colour."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 6) of images (B, 3, H, W)."""
        pixels = images.flatten(2)
        features: Tensor = torch.cat([pixels.mean(2), pixels.std(2)], dim=1)
        return features

    def describe(self) -> dict[str, Any]:
        return {"network": "toy_features.MeanColour"}
