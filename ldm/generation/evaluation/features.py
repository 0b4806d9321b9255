"""Features of numbered images on disk, a part at a time: computed once, by whichever process, for whichever metric."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.files import replacing, write_text
from ldm.generation.evaluation.batches import batches, row_of, stacked
from ldm.generation.evaluation.images import Images
from ldm.generation.evaluation.workers import Task
from ldm.metrics import Statistics, describe_network, extract
from ldm.metrics.fid import gaussian
from ldm.metrics.products import add_gram_

# Images of a part. Of real ones always, whatever the shards of samples, so that every evaluation finds their features.
PART = 1000


class FeatureStore:
    """Features of a set of images by several networks: folder/features/KEY/00000.npy, (n, D), n images a part.

    Args:
        images: the set.
        folder: where its features are kept, of these very images.
        part_size: images of a part.
        batch_size: images that networks see at once; their parts, and so the values, do not depend on who computes.
        num_workers: processes that read images.
    """

    def __init__(
        self, images: Images, folder: Path, *, part_size: int = PART, batch_size: int = 64, num_workers: int = 0
    ) -> None:
        self.images, self.folder = images, folder
        self.part_size, self.batch_size, self.num_workers = part_size, batch_size, num_workers

    @property
    def num_parts(self) -> int:
        """How many parts there are."""
        return -(-len(self.images) // self.part_size)

    def places(self, part: int) -> range:
        """The numbers of a part's images."""
        return range(part * self.part_size, min((part + 1) * self.part_size, len(self.images)))

    def path(self, key: str, part: int) -> Path:
        """Where the features of a part by the network of this key are."""
        return self.folder / "features" / key / f"{part:05d}.npy"

    def tasks(self, networks: Mapping[str, nn.Module], device: torch.device) -> list[Task]:
        """A task a part: every network that has not yet seen its images does."""
        return [
            Task(
                f"features-{part:05d}.lock",
                partial(self._has, list(networks), part),
                partial(self._extract, networks, part, device),
            )
            for part in range(self.num_parts if networks else 0)
        ]

    def batches(self, part: int) -> Iterator[dict[str, Any]]:
        """The images of a part; see `ldm.generation.evaluation.batches.batches`."""
        return self.batches_of(self.places(part))

    def batches_of(self, places: range) -> Iterator[dict[str, Any]]:
        """The images of these places."""
        return batches(self.images, places, batch_size=self.batch_size, num_workers=self.num_workers)

    def features(self, key: str, part: int) -> Tensor:
        """Features (n, D) of a part."""
        return torch.from_numpy(np.load(self.path(key, part), allow_pickle=False))

    def rows(self, part: int) -> dict[str, Any]:
        """What belongs to a part's images besides their pixels: "index" (n,), "prompt" (n texts), labels (n,)."""
        return stacked([{**row_of(self.images, index), "index": index} for index in self.places(part)])

    def statistics(self, key: str, network: nn.Module) -> Statistics:
        """Mean and covariance of all features, computed once and kept in folder/KEY.npz."""
        path = self.folder / f"{key}.npz"
        if path.is_file():
            return Statistics.read(path)
        statistics = self._sum(key, {**self.facts, "features": describe_network(network)})
        statistics.write(path)
        return statistics

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the images are, for protocols."""
        return self.images.describe()

    def _has(self, keys: list[str], part: int) -> bool:
        return all(self.path(key, part).is_file() for key in keys)

    @torch.no_grad()
    def _extract(self, networks: Mapping[str, nn.Module], part: int, device: torch.device) -> None:
        missing = {key: network for key, network in networks.items() if not self.path(key, part).is_file()}
        if not missing:
            return
        found: dict[str, list[Tensor]] = {key: [] for key in missing}
        for batch in self.batches(part):
            images = batch["image"].to(device).float() / 127.5 - 1
            for key, features in extract({k: network.to(device) for k, network in missing.items()}, images).items():
                found[key].append(_storable(features))
        for key, parts in found.items():
            array = torch.cat(parts).numpy()
            with replacing(self.path(key, part)) as temporary, temporary.open("wb") as stream:
                np.save(stream, array)
            note = self.folder / "features" / key / "network.json"
            if not note.is_file():
                write_text(note, json.dumps(describe_network(networks[key]), indent=1, default=str) + "\n")

    def _sum(self, key: str, provenance: Mapping[str, Any]) -> Statistics:
        count = len(self.images)
        if count < 2:
            raise ValueError(f"got {count} reference images, expected at least 2 for a covariance; give more")
        size = self.features(key, 0).shape[1]
        total, outer = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
        for part in range(self.num_parts):
            features = self.features(key, part).double()
            total += features.sum(dim=0)
            add_gram_(outer, features)
        return Statistics(*gaussian(total, outer, torch.tensor(float(count)).double()), count, provenance)


def reference_store(images: Images, cache: Path, *, batch_size: int, num_workers: int) -> FeatureStore:
    """The store of real images in the cache: a folder for each content and preprocessing, wherever they come from.

    Args:
        cache: the folder of all references.
        batch_size, num_workers: of `FeatureStore`.
    """
    facts = images.describe()
    identity = {name: value for name, value in facts.items() if name != "path"}
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    store = FeatureStore(images, cache / name, part_size=PART, batch_size=batch_size, num_workers=num_workers)
    store.__dict__["facts"] = facts
    note = store.folder / "description.json"
    if not note.is_file():
        write_text(note, json.dumps(facts, indent=1) + "\n")
    return store


def _storable(features: Tensor) -> Tensor:
    features = features.detach().cpu()
    return features if features.dtype in (torch.float32, torch.float64) else features.float()
