"""Feature networks of the metrics, and the one place where images become the numbers that a PNG would hold.

A feature network is an `nn.Module` with an attribute `num_features` that maps images (B, 3, H, W) in [-1, 1] to
(B, num_features). Metrics hand it images that went through `quantize` first. A `describe()` that returns a dict goes
into the protocol of the values; without one the class and a hash of the tensors do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.metrics.weights import sha256_of_tensors


def quantize(images: Tensor) -> Tensor:
    """Images in [-1, 1] as the uint8 levels of their PNG: clamped, then rounded; same shape.

    Casting without the clamp would wrap -1.01 round to 254, without the rounding it would darken every image.
    """
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def as_seen(images: Tensor) -> Tensor:
    """Images in [-1, 1] as they come back from their PNG, float32 in [-1, 1]."""
    return quantize(images).float() / 127.5 - 1


def num_features_of(network: nn.Module) -> int:
    """The size of a network's features; raises ValueError where the network does not say."""
    size = getattr(network, "num_features", None)
    if not isinstance(size, int):
        raise ValueError(
            f"got {type(network).__name__} as feature network, expected an nn.Module with an integer `num_features`; "
            "give it that attribute"
        )
    return size


def describe_network(network: nn.Module) -> dict[str, Any]:
    """What identifies a feature network: its own `describe()`, or its class and the SHA-256 of its tensors."""
    describe = getattr(network, "describe", None)
    if describe is not None:
        return dict(describe())
    kind = type(network)
    return {"network": f"{kind.__module__}.{kind.__qualname__}", "sha256": sha256_of_tensors(network.state_dict())}


class ClassifierFeatures(nn.Module):
    """One output of a classifier as features, e.g. "features" or "digit" of `ldm.networks.DigitClassifier`.

    Args:
        classifier: maps images (B, 3, H, W) in [-1, 1] to an object with tensors (B, D) as attributes.
        output: the attribute to take.
        num_features: its size D.
    """

    def __init__(self, classifier: nn.Module, *, output: str = "features", num_features: int = 64) -> None:
        super().__init__()
        self.classifier = classifier
        self.output = output
        self.num_features = num_features

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol: the classifier and which of its outputs."""
        return {**describe_network(self.classifier), "output": self.output}

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, 3, H, W) in [-1, 1]."""
        features: Tensor = getattr(self.classifier(images), self.output)
        return features
