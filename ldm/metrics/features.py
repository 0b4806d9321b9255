"""Feature networks of the metrics, and the one place where images become the numbers that a PNG would hold.

A feature network is an `nn.Module` with an attribute `num_features` that maps images (B, 3, H, W) in [-1, 1] to
(B, num_features). Metrics hand it images that went through `quantize` first. A `describe()` that returns a dict goes
into the protocol of the values; without one the class and hashes of the tensors and of the settings do.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

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
    """What identifies a feature network: its own `describe()`, or its class and hashes of its tensors and settings."""
    describe = getattr(network, "describe", None)
    if describe is not None:
        return dict(describe())
    settings = hashlib.sha256(f"{network!r}{_settings(network)}".encode()).hexdigest()[:16]
    return {"network": _name(network), "sha256": sha256_of_tensors(_tensors(network)), "settings_sha256": settings}


def describe_metric(metric: Metric) -> dict[str, Any]:
    """What a protocol says of a metric: its own `describe()`, or its class, plain settings, tensors and networks."""
    describe = getattr(metric, "describe", None)
    if describe is not None:
        return dict(describe())
    own = {name: value for name, value in vars(metric).items() if name not in {*_OF_EVERY_METRIC, *metric._defaults}}
    settings = {name: value for name, value in own.items() if isinstance(value, str | int | float | list | tuple)}
    tensors = {**dict(metric.named_buffers(recurse=False)), **{n: v for n, v in own.items() if torch.is_tensor(v)}}
    networks = {name: describe_network(part) for name, part in metric.named_children()}
    hashes = {"sha256": sha256_of_tensors(tensors)} if tensors else {}
    return {"metric": _name(metric), **settings, **hashes, **networks}


class _BareMetric(Metric):
    def update(self) -> None: ...

    def compute(self) -> None: ...


_OF_EVERY_METRIC = frozenset(vars(_BareMetric()))


def _name(part: nn.Module) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All that a module computes with: parameters, buffers, saved or not, and tensors that are plain attributes."""
    plain = {
        f"{place}.{name}": value
        for place, part in module.named_modules()
        for name, value in vars(part).items()
        if torch.is_tensor(value)
    }
    return {**module.state_dict(), **dict(module.named_buffers()), **plain}


def _settings(module: nn.Module) -> list[str]:
    """The numbers and names among the attributes of a module and of its parts."""
    return [
        f"{place}.{name}={value}"
        for place, part in module.named_modules()
        for name, value in sorted(vars(part).items())
        if isinstance(value, str | int | float) and name != "training"
    ]


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
