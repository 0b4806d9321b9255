"""Pairwise diversity: how far samples of one prompt lie from one another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ldm.metrics.features import as_seen, describe_network


class PairwiseDiversity(Metric):
    """Mean perceptual distance over all pairs of samples of one prompt, averaged over prompts.

    Args:
        distance: `ldm.metrics.LPIPS`, or a module with `embed(images (B, 3, H, W) in [-1, 1])` to a list of tensors
            (B, ...) and `between(activations, others)` to distances (B,).

    Raises:
        ValueError: another module; in `update`, fewer than two samples of a prompt.

    Source: Zhu et al. 2017 (BicycleGAN), section 5, with LPIPS.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    takes = "prompts"

    total: Tensor
    count: Tensor

    def __init__(self, distance: nn.Module) -> None:
        super().__init__()
        if not (hasattr(distance, "embed") and hasattr(distance, "between")):
            raise ValueError(
                f"got {type(distance).__name__} as distance, expected a module with embed and between, e.g. "
                "ldm.metrics.LPIPS"
            )
        self.distance: Any = distance.eval()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor) -> None:
        """Adds all samples (K, 3, H, W) in [-1, 1] of one prompt."""
        if len(images) < 2:
            raise ValueError(f"got {len(images)} samples of a prompt, expected at least 2; pairs need them")
        activations = self.distance.embed(as_seen(images))
        total = torch.zeros((), dtype=torch.float64, device=images.device)
        for gap in range(1, len(images)):
            pairs = self.distance.between([x[gap:] for x in activations], [x[:-gap] for x in activations])
            total += pairs.double().sum()
        self.total += total / (len(images) * (len(images) - 1) / 2)
        self.count += 1

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol."""
        return {"distance": describe_network(self.distance)}

    def compute(self) -> Tensor:
        """The mean over prompts, a float64 scalar; NaN without any."""
        return self.total / self.count
