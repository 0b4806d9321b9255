"""Samples of what real samples tell: inpainting, upscaling, layouts and maps are measured on a validation split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from ldm.conditioners import Conditioner
from ldm.data.batches import assemble, to_numbers
from ldm.diffusion import Conditioning
from ldm.generation.evaluation.evaluate import Evaluation, Subject
from ldm.generation.evaluation.prompts import caption_prompts
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


Tell = Callable[[Sequence[int]], Told]
"""From the seeds of samples to the task that tells the network what their real samples tell."""


def telling(evaluation: Evaluation, pipeline: Pipeline, data: Any, *, split: str = "validation") -> Tell:
    """Makes an evaluation ask for pictures of what the samples of a split tell, and says how each is told.

    Picture i of n is told sample i * N // n of N; without `num_samples` there is one a sample, which pairs pictures
    with originals.

    Args:
        evaluation: gets the samples' captions and labels as its prompts.
        data: a data module whose `derive` makes what the conditioner reads.
    """
    dataset = data.dataset(split).unaugmented()
    evaluation.prompts = list(caption_prompts(data, split))
    evaluation.prompts_source = f"{split} samples, all that they tell"
    count = evaluation.num_samples or len(dataset)

    def tell(seeds: Sequence[int]) -> Told:
        numbers = [(seed - evaluation.seed) * len(dataset) // count for seed in seeds]
        batch = assemble((dataset.read((number, number, 0)) for number in numbers), len(numbers))
        cond, uncond = conditions_of(to_numbers(batch, colour_space=data.augmentation.colour_space), pipeline)
        return Told(cond, uncond, {seed: row for row, seed in enumerate(seeds)})

    return tell


def evaluate_told(
    evaluation: Evaluation,
    pipeline: Pipeline,
    tell: Tell,
    subject: Subject,
    *,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Makes a picture of what each sample tells the network, and measures them beside the reference.

    Args:
        tell: of `telling`.
        settings: of sampling, where they differ from the pipeline's own.

    Raises:
        ValueError: the samples lack what the conditioner reads.
    """
    chosen = replace(pipeline.settings, **(settings or {}))

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        orders = [Order(prompt, seed, evaluation.negative_prompt) for prompt, seed in zip(prompts, seeds, strict=True)]
        return to_pil(pipeline.draw(orders, task=tell(seeds), settings=chosen, batch_size=len(orders)))

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
