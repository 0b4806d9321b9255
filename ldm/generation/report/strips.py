"""Denoising strips: what the model believed the picture to be, from the first step to the last."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ldm.files import replacing, write_text
from ldm.generation import TextToImage, to_pil
from ldm.generation.evaluation.workers import Task

if TYPE_CHECKING:
    from ldm.generation import Order, Pipeline, SamplingSettings
    from ldm.generation.pipeline import Step
    from ldm.generation.task import Task as Way

STRIPS = "strips"
# Pixels of the longer side of one picture in a strip, and between two.
SIDE, GAP = 160, 3


@dataclass(frozen=True)
class Strip:
    """One sample's x_0 predictions side by side; `steps` says after how many of `num_steps` each was made."""

    index: int
    told: str
    seed: int | None
    steps: Sequence[int]
    num_steps: int
    picture: Image.Image


def strip_tasks(
    pipeline: Pipeline,
    orders: Sequence[Order],
    folder: Path,
    *,
    indices: Sequence[int],
    settings: SamplingSettings,
    how: Callable[[Order], Way] | None = None,
    num_pictures: int = 8,
) -> list[Task]:
    """A task an order: samples it again and writes strips/NNNNNNNN.webp and, as the mark, .json for the report.

    Args:
        indices: the places of the orders in the evaluation.
        how: an order is sampled; None = from its prompt.
        num_pictures: in a strip, the last of which is the result.
    """

    def task(order: Order, index: int) -> Task:
        path = folder / STRIPS / f"{index:08d}.json"

        def run() -> None:
            way = TextToImage() if how is None else how(order)
            steps = pipeline.steps([order], task=way, settings=settings, batch_size=1)
            _write(pipeline, order, steps, path, num_pictures)

        return Task(f"strip-{index:08d}.lock", path.is_file, run)

    return [task(order, index) for order, index in zip(orders, indices, strict=True)]


def _write(pipeline: Pipeline, order: Order, steps: Iterable[Step], path: Path, num_pictures: int) -> None:
    pictures: list[Image.Image] = []
    chosen: Sequence[int] = []
    num_steps = 0
    for step in steps:
        num_steps = step.num_steps
        chosen = chosen_steps(num_steps, num_pictures)
        if step.number in chosen and step.state.prediction is not None:
            believed = step.state.x if step.is_last else step.state.prediction.x_0
            pictures += to_pil(pipeline.decode(believed))
    row = side_by_side(pictures)
    with replacing(path.with_suffix(".webp")) as temporary:
        row.save(temporary, format="WEBP", quality=85)
    told = {"index": int(path.stem), "prompt": order.prompt, "seed": order.seed, "steps": chosen}
    write_text(path, json.dumps({**told, "num_steps": num_steps}) + "\n")


def chosen_steps(num_steps: int, count: int) -> list[int]:
    """At most `count` of the steps 1 to num_steps, evenly spread, the first and the last among them."""
    if num_steps <= count:
        return list(range(1, num_steps + 1))
    return sorted({1 + round(i * (num_steps - 1) / (count - 1)) for i in range(count)}) if count > 1 else [num_steps]


def read_strips(folder: Path) -> list[Strip]:
    """The strips of an evaluation, by index; none where none were made."""
    found = []
    for file in sorted((folder / STRIPS).glob("*.json")):
        told, picture = json.loads(file.read_text()), file.with_suffix(".webp")
        if picture.is_file():
            with Image.open(picture) as image:
                shown = image.convert("RGB")
            words = told["prompt"] or "no condition"
            found.append(Strip(told["index"], words, told["seed"], told["steps"], told["num_steps"], shown))
    return found


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in one row, none larger than SIDE; small ones are enlarged by whole pixels."""
    factor = max(1, 96 // max(pictures[0].size))
    shown = []
    for picture in pictures:
        enlarged = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
        enlarged.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        shown.append(enlarged)
    width, height = shown[0].size
    row = Image.new("RGB", (len(shown) * (width + GAP) - GAP, height), "white")
    for place, picture in enumerate(shown):
        row.paste(picture, (place * (width + GAP), 0))
    return row
