"""Features for many metrics at once: every network sees every image once, whoever asks for it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ldm.metrics.features import as_seen, describe_network


def share_networks(metrics: Iterable[Metric]) -> dict[str, nn.Module]:
    """The feature networks of metrics by `network_key`; equal ones become one, whose copies the metrics let go of.

    A metric that can be fed with features has `see`, and `network_name`, the attribute that holds its network. Networks
    of one `trunk`, which differ in the output that they take alone, keep one `network` together.
    """
    networks: dict[str, nn.Module] = {}
    trunks: dict[str, nn.Module] = {}
    for metric in metrics:
        name = getattr(metric, "network_name", None)
        if name is not None:
            network = getattr(metric, name)
            if hasattr(network, "trunk"):
                network.network = trunks.setdefault(network.trunk, network.network)
            setattr(metric, name, networks.setdefault(network_key(network), network))
    return networks


def network_of(metric: Any) -> nn.Module | None:
    """The feature network of a metric, or None where it takes images alone."""
    name = getattr(metric, "network_name", None)
    return None if name is None else getattr(metric, name)


def network_key(network: nn.Module) -> str:
    """A file name for a network's features: equal for equal networks with equal settings."""
    description = describe_network(network)
    text = json.dumps(description, sort_keys=True, default=str)
    name = re.sub(r"[^A-Za-z0-9]+", "_", str(description.get("network", type(network).__name__)).rpartition(".")[2])
    return f"{name.strip('_')}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@torch.no_grad()
def extract(networks: Mapping[str, nn.Module], images: Tensor) -> dict[str, Tensor]:
    """Features (B, D) by key of images (B, 3, H, W) in [-1, 1]; networks of one trunk share their pass.

    In full precision, whatever the model that made the images computes in.
    """
    with torch.autocast(images.device.type, enabled=False):
        return _extract(networks, as_seen(images))


def _extract(networks: Mapping[str, nn.Module], seen: Tensor) -> dict[str, Tensor]:
    groups: dict[str, list[str]] = {}
    for key, network in networks.items():
        groups.setdefault(getattr(network, "trunk", key), []).append(key)
    found: dict[str, Tensor] = {}
    for keys in groups.values():
        first: Any = networks[keys[0]]
        if len(keys) > 1:
            outputs = [str(networks[key].output) for key in keys]
            found |= dict(zip(keys, first.several(seen, outputs), strict=True))
        else:
            found[keys[0]] = getattr(first, "embed_images", first)(seen)
    return found


@torch.no_grad()
def feed(metric: Any, features: Tensor, batch: Mapping[str, Any], *, real: bool) -> Tensor | None:
    """Shows features (B, D) to a metric, in full precision, which then counts as updated.

    Args:
        batch: what belongs to the images besides: "index" (B,), "prompt" (a list), labels (B,).

    Returns:
        The value of each image (B,), of a metric that has one of each; else None.
    """
    with torch.autocast(features.device.type, enabled=False):
        values: Tensor | None = metric.see(features, batch, real=real)
    metric._update_count += 1
    metric._computed = None
    return values


def figures(metric: Any) -> dict[str, float]:
    """What a metric found, by the names of its parts; "" is the name of a single value."""
    found = metric.compute()
    if isinstance(found, Mapping):
        return {name: float(value) for name, value in found.items()}
    if isinstance(found, tuple):
        return {name: float(value) for name, value in zip(metric.parts, found, strict=True)}
    return {"": float(found)}
