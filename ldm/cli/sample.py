"""`ldm sample`: prompts, and pictures, to PNG files that carry their own settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from ldm.cli.album import Album
from ldm.cli.build import build, build_all
from ldm.cli.chain import shown
from ldm.cli.console import say
from ldm.cli.errors import UserError, user_mistakes
from ldm.cli.sampling import (
    check_guidance,
    check_positive,
    chosen_settings,
    find_checkpoint,
    in_precision,
    open_chosen,
    record,
)

if TYPE_CHECKING:
    from ldm.generation import Pipeline, Task

NO_PROMPT = 'prompt: got none; write prompt="a red handwritten seven on a blue background" or prompt_file=FILE'


def sample(config: DictConfig, overrides: Sequence[str]) -> None:
    """Carries out a task for every prompt and seed; writes the pictures, a grid and samples.json.

    Raises:
        UserError: no prompt, no model, or a setting is wrong.
    """
    check_numbers(config)
    check_given(config)
    check_out(Path(config.out))
    prompts, seeds = read_prompts(config), read_seeds(config, overrides)
    checkpoint = find_model(config, prompts)
    task, retouches = build_task(config), build_all(config.postprocess)
    say(f"model: {shown(checkpoint.absolute())}", style="dim")
    pipeline = open_chosen(checkpoint, config)
    prompts = prompts or prompts_left_out(pipeline)
    settings = replace(pipeline.settings, **chosen_settings(config, pipeline))
    with user_mistakes(), in_precision(config.precision, pipeline):
        orders = task.orders(prompts, seeds, negative_prompt=config.negative_prompt or "")
        album = Album(
            Path(config.out),
            orders,
            task=task,
            record=record(config, settings, checkpoint),
            retouches=retouches,
            preview_every=config.preview_every,
            with_trajectories=config.save_trajectory,
        )
        for step in pipeline.steps(orders, task=task, settings=settings, batch_size=config.batch_size):
            album.take(step, pipeline)
        album.finish()


def check_numbers(config: DictConfig) -> None:
    """Raises UserError for a number of pictures or steps, or a part of guidance, that is none."""
    check_positive(config, "num_images", "batch_size", "preview_every", "steps")
    check_guidance(config.guidance)
    if not isinstance(config.seed, int):
        raise UserError(f"seed: got {config.seed}, expected an integer")


def check_out(folder: Path) -> None:
    """Raises UserError for a folder that cannot be made, or that holds the pictures of an earlier call."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"out: got {folder}, but {place} is a file; expected a folder; name another")
    if (folder / "samples.json").exists():
        raise UserError(f"out: got {folder}, which holds pictures (samples.json); name another, or remove it")


def check_given(config: DictConfig) -> None:
    """Raises UserError for a setting of the task that has no value."""
    for key in map(str, config):
        if OmegaConf.is_missing(config, key):
            raise UserError(f"{key} has no value; set it with {key}=...")


def read_prompts(config: DictConfig) -> list[str] | None:
    """The prompt, or the lines of `prompt_file` that are not blank, or None where neither is given.

    Raises:
        UserError: both are given, or the file is missing or empty.
    """
    if config.prompt is not None and config.prompt_file is not None:
        raise UserError("prompt and prompt_file: got both, expected one of them; leave one out")
    if config.prompt is not None:
        return [str(config.prompt)]
    if config.prompt_file is None:
        return None
    path = Path(config.prompt_file).expanduser()
    if not path.is_file():
        raise UserError(f"prompt_file: got {path}, which is not a file; expected one prompt a line")
    with path.open(encoding="utf-8") as lines:  # which end where editors end them, unlike those of str.splitlines
        prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompt_file: got {path} without a line of text; expected one prompt a line")
    return prompts


def read_seeds(config: DictConfig, overrides: Sequence[str]) -> list[int]:
    """The seeds of each prompt's pictures: `seeds`, or `num_images` of them from `seed` on.

    Raises:
        UserError: seeds are no list of integers, or the other two are given as well.
    """
    if config.seeds is None:
        return [config.seed + i for i in range(config.num_images)]
    if not OmegaConf.is_list(config.seeds) or not all(isinstance(seed, int) for seed in config.seeds):
        raise UserError(f"seeds: got {config.seeds}, expected a list of integers, such as [1,7,9]")
    if not config.seeds:
        raise UserError("seeds: got an empty list, expected at least one; leave it out to count from seed")
    if also := [name for name in ("seed", "num_images") if any(item.startswith(f"{name}=") for item in overrides)]:
        raise UserError(f"seeds and {also[0]}: got both, expected one of them; leave one out")
    return list(config.seeds)


def build_task(config: DictConfig) -> Task:
    """The chosen task, its pictures read.

    Raises:
        UserError: one of its settings is wrong.
    """
    try:
        task: Task = build(config.task)
    except UserError as error:
        # The task's settings stand at the top.
        raise UserError(str(error).removeprefix("task: ")) from error
    return task


def find_model(config: DictConfig, prompts: Sequence[str] | None) -> Path:
    """Where the model is.

    Raises:
        UserError: there is none; or no prompt, which a beginner learns first.
    """
    try:
        return find_checkpoint(config)
    except UserError:
        if prompts is None and config.checkpoint is None:
            raise UserError(NO_PROMPT) from None
        raise


def prompts_left_out(pipeline: Pipeline) -> list[str]:
    """What stands for the prompt where none is given: nothing, to a model that is told nothing.

    Raises:
        UserError: the model is told something.
    """
    if pipeline.conditioner.null(1).parts():
        raise UserError(NO_PROMPT)
    return [""]
