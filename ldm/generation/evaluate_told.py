"""Samples of what real samples tell: inpainting, upscaling, layouts and maps are measured on a validation split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from ldm.conditioners import Conditioner
from ldm.data.batches import assemble, to_numbers
from ldm.diffusion import Conditioning
from ldm.generation.evaluate import Evaluation, Subject
from ldm.generation.evaluate_prompts import caption_prompts
from ldm.generation.pipeline import Pipeline, SamplingSettings
from ldm.generation.postprocess import to_pil
from ldm.generation.task import Order, Start, Task


@dataclass(frozen=True)
class Told(Task):
    """From noise, told what samples of a data set tell.

    Args:
        cond, uncond: of N samples.
        rows: the row of each picture's seed.
    """

    cond: Conditioning
    uncond: Conditioning
    rows: Mapping[int, int]

    def start(self, pipeline: Pipeline, orders: Sequence[Order], settings: SamplingSettings) -> Start:
        rows = torch.tensor([self.rows[order.seed] for order in orders], device=pipeline.device)
        noise, times = pipeline.noise(orders, settings.size), pipeline.times(settings)
        x = noise() * pipeline.denoiser.schedule.prior_std(times[0])
        return Start(x, times, _rows(self.cond, rows), _rows(self.uncond, rows), noise)


def evaluate_told(
    evaluation: Evaluation,
    pipeline: Pipeline,
    data: Any,
    subject: Subject,
    *,
    split: str = "validation",
    settings: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Makes a picture of what each sample of a split tells the network, and measures them beside the reference.

    Picture i of n is told sample i * N // n of N; without `num_samples` there is one a sample, which pairs pictures
    with originals.

    Args:
        data: a data module whose `derive` makes what the conditioner reads.
        settings: of sampling, where they differ from the pipeline's own.

    Raises:
        ValueError: the samples lack what the conditioner reads.
    """
    dataset = data.dataset(split).unaugmented()
    evaluation.prompts = list(caption_prompts(data, split))
    evaluation.prompts_source = f"{split} samples, all that they tell"
    count = evaluation.num_samples or len(dataset)
    chosen = replace(pipeline.settings, **(settings or {}))

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        numbers = [(seed - evaluation.seed) * len(dataset) // count for seed in seeds]
        batch = assemble((dataset.read((number, number, 0)) for number in numbers), len(numbers))
        cond, uncond = conditions_of(to_numbers(batch, colour_space=data.augmentation.colour_space), pipeline)
        task = Told(cond, uncond, {seed: row for row, seed in enumerate(seeds)})
        orders = [Order(prompt, seed, evaluation.negative_prompt) for prompt, seed in zip(prompts, seeds, strict=True)]
        return to_pil(pipeline.draw(orders, task=task, settings=chosen, batch_size=len(orders)))

    return evaluation.of_samples(draw, subject)


@torch.no_grad()
def conditions_of(batch: Mapping[str, Any], pipeline: Pipeline) -> tuple[Conditioning, Conditioning]:
    """(What the network is told of a batch, what guidance leads away from)."""
    conditioner, device = pipeline.conditioner, pipeline.device
    told = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in batch.items()}
    told |= {f"{name}_latents": pipeline.encode(picture, None) for name, picture in conditioner.pictures(told).items()}
    cond = conditioner(told)
    return cond, without_conditions(conditioner, cond)


def without_conditions(conditioner: Conditioner, cond: Conditioning) -> Conditioning:
    """The null condition, with the parts that are told in any case."""
    kept = {name: getattr(cond, name) for name in conditioner.always_told}
    return replace(conditioner.null(len(cond)), **kept)


def _rows(condition: Conditioning, rows: Tensor) -> Conditioning:
    return Conditioning(**{name: part[rows] for name, part in condition.parts().items()})
