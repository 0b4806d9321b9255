"""`ldm sample`: prompts to PNG files that carry their own settings."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

import ldm
from ldm.cli.chain import shown
from ldm.cli.console import heading, say
from ldm.cli.errors import UserError, user_mistakes
from ldm.cli.run_folder import write_json
from ldm.cli.sampling import chosen_settings, describe, find_checkpoint, in_precision, open_pipeline

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Order:
    """One picture to make."""

    prompt: str
    seed: int


def sample(config: DictConfig, overrides: Sequence[str]) -> None:
    """Samples `num_images` pictures of every prompt; writes them, a grid and samples.json.

    Raises:
        UserError: no prompt, no model, or a setting is wrong.
    """
    orders = [Order(prompt, config.seed + i) for prompt in read_prompts(config) for i in range(_count(config))]
    checkpoint = find_checkpoint(config)
    say(f"model: {shown(checkpoint.absolute())}", style="dim")
    pipeline = open_pipeline(checkpoint, config.device)
    chosen = chosen_settings(config, pipeline)
    with user_mistakes(), in_precision(config.precision, pipeline):
        pictures = pipeline.sample(
            [order.prompt for order in orders],
            seeds=[order.seed for order in orders],
            negative_prompt=config.negative_prompt or "",
            batch_size=config.batch_size,
            **chosen,
        )
    record = {
        "negative_prompt": config.negative_prompt or "",
        **describe(replace(pipeline.settings, **chosen)),
        "precision": str(config.precision),
        "checkpoint": str(checkpoint),
        "ldm": ldm.__version__,
    }
    write(Path(config.out), orders, pictures, record=record)


def read_prompts(config: DictConfig) -> list[str]:
    """The prompt, or the lines of `prompt_file` that are not blank.

    Raises:
        UserError: neither is given, or both, or the file is missing or empty.
    """
    if config.prompt is not None and config.prompt_file is not None:
        raise UserError("prompt and prompt_file: got both, expected one of them; leave one out")
    if config.prompt is not None:
        return [str(config.prompt)]
    if config.prompt_file is None:
        raise UserError(
            'prompt: got none; write prompt="a red handwritten seven on a blue background" or prompt_file=FILE'
        )
    path = Path(config.prompt_file).expanduser()
    if not path.is_file():
        raise UserError(f"prompt_file: got {path}, which is not a file; expected one prompt a line")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"prompt_file: got {path} without a line of text; expected one prompt a line")
    return prompts


def write(folder: Path, orders: Sequence[Order], pictures: Sequence[Image], *, record: dict[str, Any]) -> None:
    """Writes NNNNN_<prompt>_<seed>.png for each picture, grid.png and samples.json, and says where they are."""
    from PIL.PngImagePlugin import PngInfo

    from ldm.generation import grid

    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for number, (order, picture) in enumerate(zip(orders, pictures, strict=True)):
        file = f"{number:05d}_{slug(order.prompt)}_{order.seed}.png"
        entry = {"file": file, "prompt": order.prompt, "seed": order.seed, **record}
        information = PngInfo()
        information.add_text("ldm", json.dumps(entry))
        information.add_text("parameters", parameters(entry))
        picture.save(folder / file, pnginfo=information)
        samples.append(entry)
    grid(pictures).save(folder / "grid.png")
    write_json(folder / "samples.json", samples)
    heading(f"{len(samples)} picture{'s' if len(samples) > 1 else ''} in {shown(folder.absolute())}")
    say(f"  all in one  {shown((folder / 'grid.png').absolute())}")
    say(f"  settings    {shown((folder / 'samples.json').absolute())}")


def slug(prompt: str, *, length: int = 40) -> str:
    """A prompt as part of a file name."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:length].rstrip("-") or "picture"


def parameters(entry: dict[str, Any]) -> str:
    """The settings in the text form that picture viewers for generated images read."""
    negative = f"\nNegative prompt: {entry['negative_prompt']}" if entry["negative_prompt"] else ""
    values = {
        "Steps": entry["num_steps"],
        "Sampler": entry["sampler"],
        "CFG scale": entry["guidance"].get("scale"),
        "Seed": entry["seed"],
        "Size": f"{entry['image_size']}x{entry['image_size']}",
        "Model": entry["checkpoint"],
    }
    return f"{entry['prompt']}{negative}\n" + ", ".join(f"{name}: {value}" for name, value in values.items())


def _count(config: DictConfig) -> int:
    for name in ("num_images", "batch_size"):
        if config[name] < 1:
            raise UserError(f"{name}: got {config[name]}, expected at least 1")
    return int(config.num_images)
