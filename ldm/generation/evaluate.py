"""What a trained model is worth: pictures of many prompts, measured beside real ones."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torchmetrics import Metric

from ldm.generation.pipeline import Pipeline
from ldm.generation.postprocess import grid, to_pil


class Reference(Protocol):
    """Where the real images come from."""

    def iterate_once(self, split: str, batch_size: int) -> Iterator[dict[str, Any]]: ...


class Evaluation:
    """Samples one picture a prompt and hands them, and the real images, to metrics.

    Args:
        prompts: each a dict with "prompt", and the labels that the metrics read; prompt i is sampled with seed + i.
        metrics: by name; `update(images, labels, real=...)` and `compute() -> dict` of numbers.
        reference: real images and their labels, of its split "validation".
        seed: of the first prompt.
        batch_size: pictures sampled at once.
    """

    def __init__(
        self,
        *,
        prompts: Sequence[Mapping[str, Any]],
        metrics: Mapping[str, Metric],
        reference: Reference,
        seed: int = 0,
        batch_size: int = 250,
    ) -> None:
        if not prompts:
            raise ValueError("got no prompts to evaluate, expected at least one")
        self.prompts, self.metrics, self.reference = list(prompts), dict(metrics), reference
        self.seed, self.batch_size = seed, batch_size

    def __call__(self, pipeline: Pipeline, folder: Path, **settings: Any) -> dict[str, float]:
        """Writes folder/evaluation.json and folder/evaluation.png and returns the numbers, as `metric/name`.

        Args:
            settings: of sampling, where they differ from the pipeline's own.
        """
        start = time.monotonic()
        images = self.sample(pipeline, **settings)
        seconds = time.monotonic() - start
        self.measure(images, pipeline.device)
        report = {
            f"{name}/{key}": float(v) for name, metric in self.metrics.items() for key, v in metric.compute().items()
        }
        report |= {"num_images": len(images), "seconds_sampling": seconds}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
        grid(to_pil(images[:100])).save(folder / "evaluation.png")
        return report

    def sample(self, pipeline: Pipeline, **settings: Any) -> Tensor:
        """One image a prompt, (N, 3, H, W) in [-1, 1]."""
        seeds = range(self.seed, self.seed + len(self.prompts))
        texts = [prompt["prompt"] for prompt in self.prompts]
        return pipeline.images(texts, seeds=seeds, batch_size=self.batch_size, **settings)

    @torch.no_grad()
    def measure(self, images: Tensor, device: torch.device) -> None:
        """Feeds the metrics with generated and real images."""
        labels = {name: [prompt[name] for prompt in self.prompts] for name in self.prompts[0] if name != "prompt"}
        for metric in self.metrics.values():
            metric.to(device).reset()
            for start in range(0, len(images), self.batch_size):
                part = slice(start, start + self.batch_size)
                metric.update(images[part], {name: torch.tensor(v[part]) for name, v in labels.items()}, real=False)
        for batch in self.reference.iterate_once("validation", 256):
            for metric in self.metrics.values():
                metric.update(batch["image"].to(device), batch, real=True)
