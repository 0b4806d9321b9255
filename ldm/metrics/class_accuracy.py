"""Class accuracy of conditional samples: whether a classifier sees the class that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ldm.metrics.features import as_seen, describe_network, num_features_of


class ClassAccuracy(Metric):
    """Share of generated images whose class is among a classifier's `top_k` guesses.

    Args:
        classifier: module from images (B, 3, H, W) in [-1, 1] to logits (B, num_features), e.g.
            `TorchvisionFeatures(layer="fc")` or `ClassifierFeatures(..., output="digit")`.
        top_k: guesses that count.
        column: the label of an evaluation's prompts that names the class.

    Raises:
        ValueError: top_k below 1 or above the number of classes; in `update`, a class that there is not.

    Source: Ravuri and Vinyals 2019 judge generated sets by classifiers; this is the direct form.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    network_name = "classifier"
    uses_real = False

    hits: Tensor
    count: Tensor

    def __init__(self, classifier: nn.Module, *, top_k: int = 1, column: str = "class_label") -> None:
        super().__init__()
        self.num_classes = num_features_of(classifier)
        if not 1 <= top_k <= self.num_classes:
            raise ValueError(f"got top_k={top_k}, expected 1 to the number of classes, {self.num_classes}")
        self.classifier, self.top_k, self.column = classifier.eval(), top_k, column
        self.add_state("hits", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Adds images (B, 3, H, W) in [-1, 1] with the classes (B,) that they were asked to be."""
        self.hits += self._hits(self.classifier(as_seen(images)), labels).sum()
        self.count += len(images)

    def see(self, features: Tensor, batch: Mapping[str, Any], *, real: bool) -> Tensor:
        """Adds generated images by their logits (B, num_features) and batch[column], the classes (B,) asked for.

        Returns:
            1.0 for each image (B,) whose class is among the guesses, else 0.0.

        Raises:
            ValueError: the batch has no such label.
        """
        if self.column not in batch:
            raise ValueError(
                f"got prompts with the labels {sorted(batch)}, expected {self.column} for the class accuracy; give "
                "prompts with that column, or set column"
            )
        hits = self._hits(features, torch.as_tensor(batch[self.column]))
        self.hits += hits.sum()
        self.count += len(features)
        return hits.double()

    def _hits(self, logits: Tensor, labels: Tensor) -> Tensor:
        if len(logits) != len(labels) or int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
            raise ValueError(
                f"got {len(logits)} images with {len(labels)} labels from {int(labels.min())} to {int(labels.max())}, "
                f"expected one each from 0 to {self.num_classes - 1}; number classes as the classifier does"
            )
        guesses = logits.topk(self.top_k, dim=1).indices
        return (guesses == labels.to(guesses.device)[:, None]).any(dim=1)

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol."""
        classifier = describe_network(self.classifier)
        return {"classifier": classifier, "top_k": self.top_k, "column": self.column}

    def compute(self) -> Tensor:
        """The share in [0, 1], a float64 scalar; NaN without images."""
        return self.hits.double() / self.count
