"""A finished evaluation as reports read it: its folder alone, without the model."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ldm.data.shards import ShardIndex, ShardReader, decode, index_shard

if TYPE_CHECKING:
    from ldm.generation.evaluation.images import Images

FIGURES, SAMPLES, FEATURES, SCORES = "evaluation.json", "samples", "features", "scores.jsonl"
TRAINING = "training.json"


@dataclass(frozen=True)
class Sample:
    """One generated picture's description; `index` is its place in the evaluation."""

    index: int
    prompt: str
    seed: int | None
    labels: Mapping[str, float]

    @property
    def told(self) -> str:
        """What the model was told, in words."""
        labels = ", ".join(f"{name} {value:g}" for name, value in self.labels.items())
        return self.prompt or labels or "no condition"


class EvaluationFolder:
    """What `ldm evaluate` wrote into one folder.

    Args:
        path: the folder.
        name: what reports call it; None = its folder's name, behind its run's where it lies in one.

    Raises:
        ValueError: it holds no finished evaluation.
    """

    def __init__(self, path: Path, *, name: str | None = None) -> None:
        file = path / FIGURES
        if not file.is_file():
            raise ValueError(
                f"got {path}, which holds no {FIGURES}, expected a folder that `ldm evaluate` finished; run it again, "
                "and it goes on"
            )
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"got {file} with a {type(content).__name__}, expected the figures of `ldm evaluate`")
        self.path, self.name = path, name or default_name(path)
        self.protocol: dict[str, Any] = content.get("protocol") or {}
        self.metrics: dict[str, dict[str, Any]] = content.get("metrics") or {}
        self.figures = {
            key: float(value)
            for key, value in content.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._reader = ShardReader()

    def figure(self, name: str) -> float | None:
        """A figure by its own name, its metric's, or the last part of its name where only one has it; or None."""
        if name in self.figures:
            return self.figures[name]
        if name in self.metrics:
            value = self.metrics[name].get("value")
            return None if value is None else float(value)
        ends = [value for key, value in self.figures.items() if key.rpartition("/")[2] == name]
        return ends[0] if len(ends) == 1 else None

    def __len__(self) -> int:
        """How many of its pictures can be read."""
        return len(self._foreign) if self._foreign is not None else sum(map(len, self._shards))

    def sample(self, index: int) -> Sample:
        """The description of a picture by its index; raises IndexError for one that is not there."""
        if self._foreign is not None:
            item = self._foreign[index]
            labels = {name: float(value) for name, value in item.items() if name not in ("image", "prompt", "index")}
            return Sample(index, item["prompt"], None, labels)
        shard, row = self._place(index)
        found = decode(shard, row, self._reader, suffixes=["json"]).get("json", {})
        seed = found.get("seed")
        return Sample(index, str(found.get("prompt") or ""), seed, found.get("labels") or {})

    def picture(self, index: int) -> Image.Image:
        """A picture by its index, RGB; raises IndexError for one that is not there."""
        if self._foreign is not None:
            return picture_of(self._foreign[index])
        shard, row = self._place(index)
        found: Image.Image = decode(shard, row, self._reader, suffixes=["png"])["png"]
        return found

    @cached_property
    def scores(self) -> dict[str, dict[int, float]]:
        """Scores of single pictures: by name, then by index; empty where no metric has any."""
        file = self.path / SCORES
        found: dict[str, dict[int, float]] = {}
        for line in file.read_text().splitlines() if file.is_file() else ():
            row = json.loads(line)
            for name, value in row.items():
                if name != "index" and isinstance(value, int | float):
                    found.setdefault(name, {})[int(row["index"])] = float(value)
        return found

    def features(self) -> Iterator[tuple[str, dict[str, Any], np.ndarray]]:
        """(key, description of the network, features (N, D) float32 by row of the samples) of each network."""
        for description in sorted((self.path / FEATURES).glob("*/network.json")):
            parts = [np.load(file, mmap_mode="r") for file in sorted(description.parent.glob("*.npy"))]
            if parts:
                yield description.parent.name, json.loads(description.read_text()), np.concatenate(parts)

    @cached_property
    def training(self) -> dict[str, Any]:
        """Where the images are that the model was trained on, and their features; empty where that is not known."""
        file = self.path / TRAINING
        found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        return found

    def training_pictures(self) -> Images | None:
        """The images that the model was trained on; None where they are gone, or are more or fewer than they were."""
        return _opened(self.training)

    def reference_pictures(self) -> Images | None:
        """The real images that were measured against, by number as their features are; None where they are gone."""
        return _opened(self.protocol.get("reference"))

    @property
    def reconstructs(self) -> bool:
        """Whether its pictures are an autoencoder's reconstructions."""
        return bool(self.protocol.get("reconstructs"))

    def originals(self) -> Images | None:
        """What was reconstructed, by number; None where nothing was, or it is gone."""
        return _opened(self.protocol.get("reconstructs"))

    def reference_features(self, key: str) -> np.ndarray | None:
        """Features (M, D) float32 of the real images by the network of this key; None where there are none."""
        return _features_in((self.protocol.get("reference") or {}).get("features_folder"), key)

    def training_features(self) -> np.ndarray | None:
        """Features (M, D) float32 of every n-th training image by the network that `training` names, or None."""
        return _features_in(self.training.get("features_folder"), str(self.training.get("network")))

    @cached_property
    def _foreign(self) -> Images | None:
        """Pictures that were not sampled here but only measured."""
        return _opened(self.protocol.get("images"))

    @cached_property
    def _shards(self) -> list[ShardIndex]:
        finished = [file.with_suffix(".tar") for file in sorted((self.path / SAMPLES).glob("*.done"))]
        return [index_shard(file, suffixes=("png", "json")) for file in finished if file.is_file()]

    @cached_property
    def _ends(self) -> list[int]:
        return np.cumsum([len(shard) for shard in self._shards], dtype=int).tolist()

    def _place(self, index: int) -> tuple[ShardIndex, int]:
        number = bisect.bisect_right(self._ends, index)
        if index < 0 or number >= len(self._shards):
            raise IndexError(f"got sample {index}, expected one below {len(self)}")
        return self._shards[number], index - (self._ends[number - 1] if number else 0)


def _features_in(folder: str | None, key: str) -> np.ndarray | None:
    """All features of a network in a store's folder, joined; None where there are none."""
    files = sorted((Path(folder) / FEATURES / key).glob("*.npy")) if folder else []
    return np.concatenate([np.load(file, mmap_mode="r") for file in files]) if files else None


def _opened(description: Mapping[str, Any] | None) -> Images | None:
    """Images where a protocol says that they were measured; None where there are none now, or more or fewer."""
    if not description or not description.get("path"):
        return None
    # torchmetrics takes seconds to import, and pages of tables and curves need none.
    from ldm.generation.evaluation.images import open_images
    from ldm.generation.evaluation.left_out import Without

    resolution = (description.get("preprocessing") or {}).get("resolution")
    try:
        found: Images = open_images(description["path"], resolution=resolution)
        if left_out := description.get("left_out"):
            found = Without(found, [one["index"] for one in left_out])
    except (ValueError, OSError):
        return None
    return found if len(found) == description.get("count") else None


def picture_of(item: Mapping[str, Any]) -> Image.Image:
    """The picture of an item of `Images`."""
    return Image.fromarray(item["image"].permute(1, 2, 0).numpy())


def default_name(path: Path) -> str:
    """runs/quickstart/1a2b3c4d/evaluations/99aabbcc is quickstart/1a2b3c4d 99aabbcc; else the folder's own name."""
    path = path.absolute()
    if path.parent.name != "evaluations":
        return path.name
    run = path.parent.parent
    return f"{run.parent.name}/{run.name} {path.name}"


def flattened(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict with dotted names; a list is one value."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
