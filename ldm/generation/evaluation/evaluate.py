"""What a trained model is worth: samples of many prompts, or images of any origin, measured beside real ones."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchmetrics import Metric

from ldm.files import write_text
from ldm.generation.encode import weights_sha256
from ldm.generation.evaluation.features import PART, FeatureStore, reference_store
from ldm.generation.evaluation.folder import (
    RESULT,
    answers,
    clear,
    digest,
    finite,
    is_clear,
    keep_plan,
    merged,
    remove_remains,
    show,
)
from ldm.generation.evaluation.images import Images, ShardImages, names_of_arrays, open_images, reference_images
from ldm.generation.evaluation.left_out import BAD_IMAGES, readable
from ldm.generation.evaluation.measurement import Measurement, compares_pairs, needs_real, write_scores
from ldm.generation.evaluation.protocol import describe_settings, versions
from ldm.generation.evaluation.samples import Draw, Item, items_of, sampling_tasks, seconds_of, sha256_of_items
from ldm.generation.evaluation.workers import FreeWorkers, Task, Workers
from ldm.generation.pipeline import Pipeline
from ldm.metrics import share_networks


@dataclass(frozen=True)
class Subject:
    """What is measured, where and by whom.

    Args:
        folder: of the evaluation.
        device: where networks and metrics compute.
        about: what the protocol says of the model and of how it was sampled, as JSON.
        workers: who shares the work.
    """

    folder: Path
    device: torch.device
    about: Mapping[str, Any]
    workers: Workers


class Evaluation:
    """Samples a picture for each prompt, keeps them as shards, and measures them beside real images.

    Every shard of samples and every part of features is done whole or not at all and stays on disk, so a killed
    evaluation goes on where it was, several processes share one, and metrics that are added later sample nothing anew.
    Image i has seed `seed + i`. Every network sees an image once, whatever the number of metrics; nothing but a
    part's features, and what a metric keeps, is in memory.

    Args:
        metrics: by name; those of `ldm.metrics`, or any whose `update` takes images and, by these names, labels (a
            dict), index, real (bool) or originals.
        prompts: each a dict with "prompt", and the labels that metrics read.
        prompts_source: where the prompts come from, for the protocol.
        reference: real images and their labels: a data module (its split `split`), a folder, zip, shards or .npz of
            images, or an .npz of statistics, which serves Fréchet distances alone.
        num_samples: spread evenly over the prompts; None = one a prompt.
        seed: of the first sample.
        batch_size: pictures sampled at once.
        negative_prompt: what guidance leads away from.
        shard_size: samples of a shard, and images of a part of features.
        feature_batch_size: images that a feature network sees at once.
        num_workers: processes that read images.
        split: of a data module that is the reference.
        resolution: pixels to which images of files are scaled and cut as in training; None = as they are.
        reference_cache: folder that keeps the features of real images; None = "reference" beside the evaluation.
        keep_images: whether samples and their features stay.
        bad_images: what becomes of images of files that cannot be read: "refuse" the evaluation, or "skip" them, for
            which each is tried first; the protocol lists what is left out.
    """

    def __init__(
        self,
        *,
        metrics: Mapping[str, Metric],
        prompts: Sequence[Mapping[str, Any]] = ({"prompt": ""},),
        prompts_source: str | None = None,
        reference: Any = None,
        num_samples: int | None = None,
        seed: int = 0,
        batch_size: int = 250,
        negative_prompt: str = "",
        shard_size: int = PART,
        feature_batch_size: int = 64,
        num_workers: int = 0,
        split: str = "validation",
        resolution: int | None = None,
        reference_cache: Path | str | None = None,
        keep_images: bool = True,
        bad_images: str = "refuse",
    ) -> None:
        if not prompts:
            raise ValueError("got no prompts to evaluate, expected at least one")
        if not metrics:
            raise ValueError("got no metric, expected at least one; set metrics=[fid]")
        counts = {"batch_size": batch_size, "shard_size": shard_size, "feature_batch_size": feature_batch_size}
        if num_samples is not None:
            counts["num_samples"] = num_samples
        if wrong := next((f"{name}={value}" for name, value in counts.items() if value < 1), None):
            raise ValueError(f"got {wrong}, expected at least 1")
        # Of any kind: what a metric can do besides `update` and `compute` is found out where it matters.
        self.metrics: dict[str, Any] = dict(metrics)
        self.prompts, self.reference = list(prompts), reference
        self.prompts_source = prompts_source
        self.num_samples, self.seed, self.batch_size = num_samples, seed, batch_size
        self.negative_prompt, self.split, self.resolution = negative_prompt, split, resolution
        self.reference_cache = None if reference_cache is None else Path(reference_cache)
        if bad_images not in BAD_IMAGES:
            raise ValueError(f"got bad_images={bad_images!r}, expected one of {', '.join(BAD_IMAGES)}")
        self.keep_images, self.bad_images = keep_images, bad_images
        self.stores = {"part_size": shard_size, "batch_size": feature_batch_size, "num_workers": num_workers}
        if num_workers < 0:
            raise ValueError(f"got num_workers={num_workers}, expected 0 or more")
        self.networks = share_networks(self.metrics.values())
        self._stores: dict[tuple[int, Path], FeatureStore] = {}

    def __call__(
        self,
        pipeline: Pipeline,
        folder: Path,
        *,
        about: Mapping[str, Any] | None = None,
        workers: Workers | None = None,
        **settings: Any,
    ) -> dict[str, float]:
        """Writes folder/evaluation.json, the samples and their grid, and returns the numbers, as `metric/name`.

        Args:
            about: what the protocol says of the model; None = `facts`.
            workers: who shares the work; None = any process that runs the same evaluation.
            settings: of sampling, where they differ from the pipeline's own.
        """
        facts = about or self.facts(pipeline, **settings)
        subject = Subject(folder, pipeline.device, facts, workers or FreeWorkers())
        draw = partial(
            _draw, pipeline, negative_prompt=self.negative_prompt, batch_size=self.batch_size, settings=settings
        )
        return self.of_samples(draw, subject)

    def facts(self, pipeline: Pipeline, **settings: Any) -> dict[str, Any]:
        """What a protocol says of a pipeline with these settings: how it samples, and the hash of its weights."""
        parts = (pipeline.denoiser, pipeline.conditioner, pipeline.autoencoder)
        weights = hashlib.sha256("".join(map(weights_sha256, parts)).encode()).hexdigest()
        chosen = replace(pipeline.settings, **settings)
        return {**describe_settings(chosen), "negative_prompt": self.negative_prompt, "weights_sha256": weights}

    def plan(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """All that decides the samples, as JSON, and what is known of the model besides."""
        items = self._items()
        return {
            "num_samples": len(items),
            "seed": self.seed,
            "seeds": "seed + index",
            "shard_size": self.stores["part_size"],
            "prompts": {
                "source": self.prompts_source,
                "count": len(self.prompts),
                "sha256": sha256_of_items(items),
            },
            **about,
        }

    def _items(self) -> list[Item]:
        return items_of(self.prompts, num_samples=self.num_samples, seed=self.seed)

    def of_samples(self, draw: Draw, subject: Subject) -> dict[str, float]:
        """Measures what `draw` makes of the prompts."""
        items = self._items()
        self._check_labels(items)
        self.check(len(items))
        plan = self.plan(subject.about)
        keep_plan(subject.folder, plan)
        samples = subject.folder / "samples"
        tasks = sampling_tasks(items, samples, draw, shard_size=self.stores["part_size"], batch_size=self.batch_size)
        subject.workers.do(tasks, samples)
        images = ShardImages(samples)
        return self._measure(images, subject, plan, {"sampling": seconds_of(samples)})

    def of_images(self, path: Path | str, subject: Subject) -> dict[str, float]:
        """Measures the images of a folder, zip, .npz or shards; their order pairs them with originals."""
        images = self.usable(open_images(path, resolution=self.resolution))
        self.check(len(images))
        plan = {"num_samples": len(images), "images": images.describe(), **self._parts(), **subject.about}
        keep_plan(subject.folder, plan)
        return self._measure(images, subject, plan, {})

    def _parts(self) -> dict[str, int]:
        """What decides which images a part has; the usual size goes without saying."""
        size = self.stores["part_size"]
        return {"shard_size": size} if size != PART else {}

    def originals(self) -> Images:
        """The real images, whether metrics want them or not; raises ValueError where there are none."""
        if self.reference is None:
            raise ValueError("got no reference, expected real images to reconstruct; set reference=FOLDER or shards")
        return self._opened(self.reference)

    def usable(self, images: Images) -> Images:
        """These images, without those that cannot be read where such are to be skipped."""
        return readable(images, num_workers=self.stores["num_workers"]) if self.bad_images == "skip" else images

    def _opened(self, source: Any) -> Images:
        return self.usable(reference_images(source, split=self.split, resolution=self.resolution))

    def check(self, num_images: int) -> None:
        """Opens the reference and raises ValueError now for what could only fail after sampling."""
        num_real = None if self._real is None else len(self._real)
        for name, metric in self.metrics.items():
            if needs_real(metric) and self._real is None:
                what = "statistics" if self.reference is not None else "none"
                raise ValueError(
                    f"{name}: got {what} as reference, expected real images; set reference=FOLDER or shards"
                )
            if compares_pairs(metric) and num_real != num_images:
                raise ValueError(
                    f"{name}: got {num_images} images and {num_real} originals, expected as many: image i is compared "
                    "with original i"
                )
            if hasattr(metric, "check_counts"):
                metric.check_counts(num_images, num_real if needs_real(metric) else None)

    @cached_property
    def _real(self) -> Images | None:
        """The real images that metrics see; None where none does. A file of statistics goes to the metrics itself."""
        source = self.reference
        if isinstance(source, str | Path) and Path(source).suffix == ".npz" and Path(source).is_file():
            names = names_of_arrays(source)
            if "mu" in names:
                for metric in self.metrics.values():
                    if needs_real(metric) and hasattr(metric, "refer_to"):
                        metric.refer_to(source)
                        metric.reference = replace(metric.reference, provenance=_with_file(metric.reference, source))
            elif "arr_0" not in names:
                raise ValueError(
                    f"reference: got {source} with {', '.join(sorted(names)) or 'nothing'}, expected mu and sigma, or "
                    "images as arr_0"
                )
            if "arr_0" not in names:
                return None
        if source is None or not any(map(needs_real, self.metrics.values())):
            return None
        return self._opened(source)

    def _check_labels(self, items: Sequence[Item]) -> None:
        size = self.stores["part_size"]
        for name, metric in self.metrics.items():
            column = getattr(metric, "column", None)
            lacking = next((item for item in items if column not in item.labels), None) if column is not None else None
            if lacking is not None:
                raise ValueError(
                    f"{name}: got prompts with the labels {sorted(lacking.labels)}, such as {lacking.prompt!r}, "
                    f"expected {column} of every one; give prompts with it"
                )
            if getattr(metric, "takes", "") == "prompts":
                groups = groupby(items, lambda item: (item.index // size, item.prompt))
                if lonely := next((key for key, run in groups if len(list(run)) < 2), None):
                    raise ValueError(
                        f"{name}: got one sample of {lonely[1]!r} in a shard, expected at least 2 to compare; set "
                        "num_samples to a multiple of the prompts, and shard_size to one of the samples of each"
                    )

    def _measure(
        self, images: Images, subject: Subject, plan: Mapping[str, Any], seconds: Mapping[str, float]
    ) -> dict[str, float]:
        start = time.monotonic()
        generated = FeatureStore(images, subject.folder, **self.stores)
        real = None if self._real is None else self.store_of(self._real, subject.folder)
        if real is not None:
            keys = {key: self.networks[key] for key in self._keys_of_real()}
            subject.workers.do(real.tasks(keys, subject.device), real.folder)
        subject.workers.do(generated.tasks(self.networks, subject.device), subject.folder)
        measurement = Measurement(self.metrics, generated, real, folder=subject.folder, device=subject.device)
        subject.workers.do(measurement.tasks(), subject.folder)
        protocol = {name: measurement.protocol(name) for name in self.metrics}
        request = digest({"plan": plan, "metrics": protocol})
        result = subject.folder / RESULT

        def finish() -> None:
            remove_remains(subject.folder)
            found = measurement.figures()
            passed = {**seconds, "measuring": time.monotonic() - start}
            # Statistics that were read on the way say more of the reference than was known before.
            own = {name: measurement.protocol(name) for name in self.metrics}
            write_scores(subject.folder / "scores.jsonl", measurement.scores())
            show(images, subject.folder / "evaluation.png")
            report = self._report(found, own, plan, real, passed)
            write_text(result, json.dumps({**merged(result, report), "request": request}, indent=1) + "\n")

        subject.workers.once(Task("measure.lock", lambda: answers(result, request), finish), subject.folder)
        if not self.keep_images:
            subject.workers.once(
                Task("clear.lock", partial(is_clear, subject.folder), partial(clear, subject.folder)), subject.folder
            )
        report = json.loads(result.read_text())
        names = [name for name in report if name.partition("/")[0] in self.metrics or name in _COUNTS]
        return {name: math.nan if report[name] is None else report[name] for name in names}

    def store_of(self, real: Images, folder: Path) -> FeatureStore:
        """Where features of real images are kept, for an evaluation in this folder; they are hashed once."""
        cache = self.reference_cache or folder.parent / "reference"
        key = (id(real), cache)
        if key not in self._stores:
            reading = {name: self.stores[name] for name in ("batch_size", "num_workers")}
            self._stores[key] = reference_store(real, cache, **reading)
        return self._stores[key]

    def _keys_of_real(self) -> list[str]:
        """The networks that real images are shown to."""
        wanted = {id(getattr(m, m.network_name)) for m in self.metrics.values() if _feeds_on_real(m)}
        return [key for key, network in self.networks.items() if id(network) in wanted]

    def _report(
        self,
        found: Mapping[str, Mapping[str, float]],
        protocols: Mapping[str, Any],
        plan: Mapping[str, Any],
        real: FeatureStore | None,
        seconds: Mapping[str, float],
    ) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        metrics: dict[str, Any] = {}
        for name, values in found.items():
            flat |= {f"{name}/{part}" if part else name: finite(value) for part, value in values.items()}
            plain = {part or name: finite(value) for part, value in values.items()}
            metrics[name] = {
                "value": next(iter(plain.values())),
                "values": plain,
                "higher_is_better": self.metrics[name].higher_is_better,
                "protocol": protocols[name],
            }
        reference = None if real is None else {**real.facts, "features_folder": str(real.folder)}
        flat |= {"num_images": plan["num_samples"], **{f"seconds_{key}": value for key, value in seconds.items()}}
        protocol = {"images": None, **plan, "reference": reference, "versions": versions()}
        return {**flat, "metrics": metrics, "protocol": protocol, "seconds": dict(seconds)}


_COUNTS = ("num_images", "seconds_sampling", "seconds_measuring")


def _draw(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    negative_prompt: str,
    batch_size: int,
    settings: Mapping[str, Any],
) -> list[Image.Image]:
    return pipeline.sample(prompts, seeds=seeds, negative_prompt=negative_prompt, batch_size=batch_size, **settings)


def _feeds_on_real(metric: Any) -> bool:
    return hasattr(metric, "network_name") and needs_real(metric)


def _with_file(statistics: Any, path: Path | str) -> dict[str, Any]:
    """A reference file's own provenance, with its place and hash."""
    with Path(path).open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return {**statistics.provenance, "path": str(path), "sha256": sha256}
