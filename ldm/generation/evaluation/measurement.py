"""Metrics of images whose features are on disk, and of images themselves where a metric has no features."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ldm.files import replacing
from ldm.generation.evaluation.features import FeatureStore
from ldm.generation.evaluation.folder import digest
from ldm.generation.evaluation.images import RESERVED
from ldm.generation.evaluation.workers import Task
from ldm.metrics import describe_metric, feed, figures, network_key, network_of


class Measurement:
    """Metrics of generated images, beside real ones where a metric wants them.

    A metric with `see` is fed with features, which a `FeatureStore` holds. Of any other the state after each part is
    kept in folder/sums, by what the protocol says of the metric and of the originals that it saw, and the states are
    added up; where a metric's states do not add up, it sees all images at the end. Parts have fixed borders and are
    taken in order, so a value has the same bits whoever computed the parts.

    Args:
        metrics: by name.
        generated, real: the images; None where no metric needs real ones.
        folder: of the evaluation.
        device: where metrics compute.
    """

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        generated: FeatureStore,
        real: FeatureStore | None,
        *,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.metrics, self.generated, self.real = metrics, generated, real
        self.folder, self.device = folder, device
        self._scores: dict[str, list[float]] = {}
        self._digests: dict[str, str] = {}
        for metric in metrics.values():
            # What is computed here is computed from all images: there is nothing to gather from other ranks.
            metric.distributed_available_fn = lambda: False
            metric.to(device)

    def tasks(self) -> list[Task]:
        """The parts of metrics that see images themselves and whose states add up."""
        found = []
        for name, metric in self.metrics.items():
            if network_of(metric) is None and adds_up(metric):
                found += [self._sum_task(name, metric, store, side, part) for side, store, part in self._parts(metric)]
        return found

    def figures(self) -> dict[str, dict[str, float]]:
        """Each metric's values by the names of their parts, "" where there is one alone."""
        self._scores = {}
        return {name: figures(self._fed(name, metric)) for name, metric in self.metrics.items()}

    def scores(self) -> Iterator[dict[str, float]]:
        """Image by image what `figures` found of metrics that have a value of each: {"index": 0, "clip_score": 31}."""
        for index, values in enumerate(zip(*self._scores.values(), strict=True)):
            yield {"index": index, **dict(zip(self._scores, values, strict=True))}

    def protocol(self, name: str) -> dict[str, Any]:
        """What a metric says of itself, and the real images that it saw."""
        metric: Any = self.metrics[name]
        own = describe_metric(metric)
        if self.real is not None and needs_real(metric) and "reference" not in own:
            own["reference"] = self.real.facts
        return own

    def _fed(self, name: str, metric: Any) -> Metric:
        network = network_of(metric)
        if network is not None:
            key = network_key(network)
            self._feed_real(metric, key)
            for part in range(self.generated.num_parts):
                features = self.generated.features(key, part).to(self.device)
                values = feed(metric, features, self.generated.rows(part), real=False)
                if values is not None:
                    self._scores.setdefault(name, []).extend(values.tolist())
        elif adds_up(metric):
            metric.reset()
            for side, _, part in self._parts(metric):
                _add_state(metric, torch.load(self._sums(name, side, part), weights_only=True), self.device)
        else:
            metric.reset()
            for side, store, part in self._parts(metric):
                self._show(metric, store, part, is_real=side == "real")
        return metric

    def _feed_real(self, metric: Any, key: str) -> None:
        metric.reset()
        if not metric.uses_real or getattr(metric, "reference", None) is not None:
            return
        assert self.real is not None, "checked before sampling"
        if hasattr(metric, "refer_to"):
            metric.refer_to(self.real.statistics(key, network_of(metric)))  # type: ignore[arg-type]
            return
        for part in range(self.real.num_parts):
            places = torch.tensor(self.real.places(part))
            feed(metric, self.real.features(key, part).to(self.device), {"index": places}, real=True)

    def _parts(self, metric: Metric) -> Iterator[tuple[str, FeatureStore, int]]:
        yield from (("generated", self.generated, part) for part in range(self.generated.num_parts))
        if self.real is not None and needs_real(metric) and not compares_pairs(metric):
            yield from (("real", self.real, part) for part in range(self.real.num_parts))

    def _sum_task(self, name: str, metric: Any, store: FeatureStore, side: str, part: int) -> Task:
        path = self._sums(name, side, part)

        def run() -> None:
            metric.reset()
            self._show(metric, store, part, is_real=side == "real")
            state = {key: getattr(metric, key).cpu() for key in metric._defaults}
            with replacing(path) as temporary:
                torch.save(state, temporary)
            metric.reset()

        return Task(f"{name}-{side}-{part:05d}.lock", path.is_file, run)

    def _sums(self, name: str, side: str, part: int) -> Path:
        if name not in self._digests:
            self._digests[name] = digest(self.protocol(name))
        return self.folder / "sums" / f"{name}-{self._digests[name]}" / f"{side}-{part:05d}.pt"

    @torch.no_grad()
    def _show(self, metric: Any, store: FeatureStore, part: int, *, is_real: bool) -> None:
        """Shows a metric the images of a part, in full precision, whatever the model that made them computes in."""
        with torch.autocast(self.device.type, enabled=False):
            self._show_all(metric, store, part, is_real=is_real)

    def _show_all(self, metric: Any, store: FeatureStore, part: int, *, is_real: bool) -> None:
        show = _by_prompt if getattr(metric, "takes", "") == "prompts" else None
        if compares_pairs(metric):
            assert self.real is not None, "checked before sampling"
            originals = self.real.batches_of(store.places(part))
            for batch, other in zip(store.batches(part), originals, strict=True):
                metric.update(self._pixels(batch), self._pixels(other))
            return
        for batch in show(store.batches(part)) if show else store.batches(part):
            labels = {key: value for key, value in batch.items() if key not in RESERVED and torch.is_tensor(value)}
            labels |= {"index": batch["index"]}
            _update(metric, self._pixels(batch), labels, is_real=is_real)

    def _pixels(self, batch: Mapping[str, Any]) -> Tensor:
        images: Tensor = batch["image"].to(self.device).float() / 127.5 - 1
        return images


def needs_real(metric: Any) -> bool:
    """Whether a metric is to be shown real images."""
    if hasattr(metric, "uses_real"):
        return bool(metric.uses_real) and getattr(metric, "reference", None) is None
    return compares_pairs(metric) or "real" in _parameters(metric)


def compares_pairs(metric: Any) -> bool:
    """Whether a metric compares each image with an original of its own."""
    return "originals" in _parameters(metric)


def adds_up(metric: Any) -> bool:
    """Whether all of a metric's states are sums, so that the states of parts add up to that of the whole."""
    reductions = metric._reductions.values()
    return bool(reductions) and all(getattr(kind, "__name__", "") == "dim_zero_sum" for kind in reductions)


def write_scores(path: Path, scores: Iterator[dict[str, float]]) -> None:
    """A line of JSON for each image; no file where no metric has a value of each."""
    first = next(scores, None)
    if first is None:
        return
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(first) + "\n")
        file.writelines(json.dumps(row) + "\n" for row in scores)


def _parameters(metric: Any) -> list[str]:
    # torchmetrics wraps `update`, and keeps its signature.
    return list(inspect.signature(metric.update).parameters)


def _update(metric: Any, images: Tensor, labels: Mapping[str, Any], *, is_real: bool) -> None:
    """Calls `update` with what it takes by name: labels, index, real."""
    known: dict[str, Callable[[], Any]] = {
        "labels": lambda: labels,
        "index": lambda: labels["index"],
        "real": lambda: is_real,
    }
    metric.update(images, **{name: known[name]() for name in _parameters(metric)[1:] if name in known})


def _by_prompt(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Images of neighbouring places that have one prompt, together."""
    rows = (
        (prompt, image, index)
        for batch in batches
        for prompt, image, index in zip(batch["prompt"], batch["image"], batch["index"].tolist(), strict=True)
    )
    for prompt, run in groupby(rows, lambda row: row[0]):
        group = list(run)
        yield {
            "prompt": [prompt] * len(group),
            "image": torch.stack([image for _, image, _ in group]),
            "index": torch.tensor([index for _, _, index in group]),
        }


def _add_state(metric: Any, state: Mapping[str, Tensor], device: torch.device) -> None:
    for name, value in state.items():
        setattr(metric, name, getattr(metric, name) + value.to(device))
    metric._update_count += 1
    metric._computed = None
