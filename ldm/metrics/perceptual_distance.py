"""Mean perceptual distance between images and their originals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ldm.metrics.features import as_seen, describe_network


class PerceptualDistance(Metric):
    """Mean of a distance between reconstructions and originals: LPIPS with `ldm.metrics.LPIPS`.

    Args:
        distance: module from two batches (B, 3, H, W) in [-1, 1] to distances (B,).
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, distance: nn.Module) -> None:
        super().__init__()
        self.distance = distance.eval()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, originals: Tensor) -> None:
        """Adds images and originals, both (B, 3, H, W) in [-1, 1]."""
        self.total += self.distance(as_seen(images), as_seen(originals)).double().sum()
        self.count += len(images)

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol."""
        return {"distance": describe_network(self.distance)}

    def compute(self) -> Tensor:
        """The mean distance, a float64 scalar; NaN without images."""
        return self.total / self.count
