"""Inception Score: how sure a classifier is of each image, and how many classes the set covers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ldm.metrics.features import as_seen, describe_network, num_features_of


class InceptionScore(Metric):
    """exp(E_x KL(p(y|x) || p(y))), averaged over splits of the images by their places.

    KL splits into two sums, so per split only the summed probabilities, the summed negative entropies and the count
    are kept, in float64 and added across ranks: 50,000 images cost what one does. torchmetrics' InceptionScore keeps
    all logits and cuts its splits by a random permutation, so it depends on the order; its value for one split is a
    test here.

    Args:
        features: network from images (B, 3, H, W) in [-1, 1] to logits (B, num_features).
        splits: number of parts, of equal sizes by `part_of`. Published scores use 10 of 5,000 images.

    Raises:
        ValueError: fewer than one split.

    Source: Salimans et al. 2016, section 4.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    network_name = "features"
    uses_real = False
    parts = ("mean", "std")

    probabilities: Tensor
    negative_entropies: Tensor
    counts: Tensor

    def __init__(self, features: nn.Module, *, splits: int = 10) -> None:
        super().__init__()
        if splits < 1:
            raise ValueError(f"got splits={splits}, expected 1 or more")
        size = num_features_of(features)
        self.features = features.eval()
        self.splits = splits
        self.add_state("probabilities", torch.zeros(splits, size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("negative_entropies", torch.zeros(splits, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(splits, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, index: Tensor) -> None:
        """Adds images (B, 3, H, W) in [-1, 1] with their places (B,) in the evaluated set."""
        self.see(self.features(as_seen(images)), {"index": index}, real=False)

    def see(self, features: Tensor, batch: Mapping[str, Any], *, real: bool) -> None:
        """Adds generated images by their logits (B, num_features) and batch["index"], their places (B,) in the set."""
        probabilities = features.double().softmax(dim=1)
        split = part_of(batch["index"], self.splits).to(probabilities.device)
        negative_entropies = torch.special.xlogy(probabilities, probabilities).sum(dim=1)
        self.probabilities.index_add_(0, split, probabilities)
        self.negative_entropies.index_add_(0, split, negative_entropies)
        self.counts.index_add_(0, split, torch.ones_like(negative_entropies))

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol."""
        return {"features": describe_network(self.features), "splits": self.splits}

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (population) over the splits that hold images, float64 scalars."""
        filled = self.counts > 0
        scores = inception_score(self.probabilities[filled], self.negative_entropies[filled], self.counts[filled])
        return scores.mean(), scores.std(correction=0)


def part_of(index: Tensor, splits: int) -> Tensor:
    """The part (B,), from 0 to splits - 1, of places (B,): the sum of their digits in base `splits`.

    Any `splits` places in a row have a part each. So they have by the last digit alone, but there classes that take
    turns, as in 1,000 classes by `index % 1000`, would be in one part each, and every score that of few classes.
    """
    # Modulo `splits` the digits' sum is that of index // splits^k over all k.
    total, power = index.clone(), splits
    while 1 < power < 2**62:
        total += index // power
        power *= splits
    return total % splits


def inception_score(probabilities: Tensor, negative_entropies: Tensor, counts: Tensor) -> Tensor:
    """Scores (S,) from summed p(y|x) (S, K), summed p log p (S,) and counts (S,).

    The mean KL is E_x[sum_y p(y|x) log p(y|x)] - sum_y p(y) log p(y).
    """
    marginal = probabilities / counts.unsqueeze(-1)
    return torch.exp(negative_entropies / counts - torch.special.xlogy(marginal, marginal).sum(dim=-1))
