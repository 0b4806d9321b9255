"""`ldm evaluate`: measures a trained model, or images of any origin, and can be stopped and shared."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from ldm.cli.build import build
from ldm.cli.chain import shown
from ldm.cli.console import heading, rank, say
from ldm.cli.errors import UserError, user_mistakes
from ldm.cli.evaluate_parts import (
    about_checkpoint,
    autoencoder_file,
    evaluation_of,
    find_training,
    folder_of_images,
    folder_of_reconstructions,
    own_device,
    own_node,
    sha256_of_file,
)
from ldm.cli.evaluate_shared import in_other_processes, is_elsewhere
from ldm.cli.evaluation_report import averaged_checkpoint, draw_strips, report_evaluation, report_sweep
from ldm.cli.run_folder import run_folder_of
from ldm.cli.sampling import check_positive, chosen_settings, find_checkpoint, in_precision, open_chosen
from ldm.cli.train import table
from ldm.cli.trust import check_targets

if TYPE_CHECKING:
    from ldm.generation import Pipeline
    from ldm.generation.evaluation.evaluate import Evaluation
    from ldm.generation.evaluation.told import Tell

SECONDS_BETWEEN_REPORTS = 10.0
# What says how to sample, and what it is where nobody says it: nothing is sampled from images= and reconstruct=.
OF_SAMPLING = {
    "num_samples": None,
    "prompts": None,
    "seed": 0,
    "negative_prompt": "",
    "steps": None,
    "image_size": None,
    "sampler": None,
    "discretization": None,
    "evaluation": None,
    "ema": None,
    "lora": None,
    "embedding": None,
}


def evaluate(config: DictConfig, overrides: Sequence[str]) -> Path:
    """Measures a model or images, writes the figures, prints them and returns their folder.

    Raises:
        UserError: no model, nothing that says how to measure it, or a setting is wrong.
    """
    check_positive(config, "num_samples", "batch_size", "shard_size", "feature_batch_size", "resolution")
    if config.images is not None:
        out, figures = measure_images(config)
    elif config.reconstruct is not None:
        out, figures = measure_autoencoder(config)
    else:
        out, figures = measure_model(config)
    heading(f"evaluated; figures in {shown(out.absolute())}")
    for line in table(figures):
        say(f"  {line}")
    report_evaluation(out.absolute(), config)
    return out.absolute()


def conclude_evaluate(folders: Sequence[Path]) -> None:
    """Draws the curves of a sweep's evaluations, on one page with their pictures."""
    report_sweep(folders)


def measure_images(config: DictConfig) -> tuple[Path, dict[str, float]]:
    """Measures images of any origin: the folder of the figures, and these.

    Raises:
        UserError: no metrics, no images, or a setting is wrong.
    """
    if config.checkpoint is not None:
        raise UserError("images and checkpoint: got both, expected one of them; leave one out")
    refuse_sampling(config, "images")
    if not config.get("metric"):
        raise UserError("metrics: got none, expected some for images=...; set metrics=[fid]")
    import torch

    from ldm.cli.sampling import usable_device
    from ldm.generation.evaluation.evaluate import Subject
    from ldm.generation.evaluation.workers import FreeWorkers

    evaluation = evaluation_of(config, None, None)
    with user_mistakes():
        out = Path(config.out) if config.out else folder_of_images(config)
        if is_elsewhere(config):
            in_other_processes(config, out, measure_images)
        device = torch.device(usable_device(own_device(config.device)))
        subject = Subject(out, device, {}, FreeWorkers(progress()))
        write_config(out, config)
        figures = evaluation.of_images(str(config.images), subject)
        lay_training_beside(evaluation, out, config, None, None)
        return out, figures


def measure_autoencoder(config: DictConfig) -> tuple[Path, dict[str, float]]:
    """Measures an autoencoder's reconstructions of the reference: the folder of the figures, and these.

    Raises:
        UserError: no metrics, no autoencoder, no reference, or a setting is wrong.
    """
    if not config.get("metric"):
        raise UserError("metrics: got none, expected some for reconstruct=...; set metrics=[rfid,reconstruction,lpips]")
    refuse_sampling(config, "reconstruct")
    import torch

    from ldm.autoencoders import Autoencoder
    from ldm.cli.sampling import usable_device
    from ldm.generation.evaluation.evaluate import Subject
    from ldm.generation.evaluation.reconstruction import evaluate_reconstructions, with_codes
    from ldm.generation.evaluation.workers import FreeWorkers

    with user_mistakes():
        file = autoencoder_file(config)
        device = torch.device(usable_device(own_device(config.device)))
        autoencoder = Autoencoder.load(file).eval().to(device)
        evaluation = evaluation_of(config, run_folder_of(file.absolute()), None)
        evaluation.metrics = with_codes(evaluation.metrics, autoencoder)
        about = {"checkpoint": {"path": str(file), "sha256": sha256_of_file(file), "step": None}}
        out = Path(config.out) if config.out else folder_of_reconstructions(config, file)
        if is_elsewhere(config):
            in_other_processes(config, out, measure_autoencoder)
        write_config(out, config)
        subject = Subject(out, device, about, FreeWorkers(progress()))
        return out, evaluate_reconstructions(evaluation, autoencoder, subject, batch_size=config.batch_size)


def measure_model(config: DictConfig) -> tuple[Path, dict[str, float]]:
    """Samples a model and measures the samples: the folder of the figures, and these.

    Raises:
        UserError: no model, nothing that says how to measure it, or a setting is wrong.
    """
    checkpoint = averaged_checkpoint(find_checkpoint(config), config.ema)
    folder = run_folder_of(checkpoint.absolute())
    own = None if config.get("metric") else find_evaluation(config, folder)
    say(f"model: {shown(checkpoint.absolute())}", style="dim")
    elsewhere = is_elsewhere(config)
    told = config.copy()
    # Where others compute, the model is opened here for its hash alone, which names the folder.
    config.device = "cpu" if elsewhere else own_device(config.device)
    pipeline = open_chosen(checkpoint, config)
    settings = chosen_settings(config, pipeline)
    evaluation = evaluation_of(config, folder, pipeline) if own is None else build(own)
    with in_precision(config.precision, pipeline):
        tell = None if config.conditions is None else find_telling(evaluation, pipeline, config, folder)
        about = description(evaluation, pipeline, settings, config, checkpoint, folder)
        out = place_of(evaluation, about, config, folder)
        if elsewhere:
            told.checkpoint = str(checkpoint.absolute())
            in_other_processes(told, out, measure_model)
        figures = measured(evaluation, pipeline, out, about, tell=tell, settings=settings, config=config)
        if about is not None:
            lay_training_beside(evaluation, out, config, folder, pipeline)
            draw_strips(pipeline, out, config, settings, tell)
    return out, figures


def refuse_sampling(config: DictConfig, what: str) -> None:
    """Raises UserError for a setting of sampling, which would have no effect on what is measured."""
    given = [name for name, value in OF_SAMPLING.items() if config.get(name, value) != value]
    given += [f"guidance.{name}" for name, value in config.guidance.items() if value is not None]
    if given:
        raise UserError(
            f"{given[0]}: got one with {what}=..., which samples nothing and takes all images; leave it out"
        )


def description(
    evaluation: object,
    pipeline: Pipeline,
    settings: dict[str, Any],
    config: DictConfig,
    checkpoint: Path,
    folder: Path | None,
) -> dict[str, Any] | None:
    """What the protocol says of the model; None for an experiment's evaluation of another kind than ours."""
    from ldm.generation.evaluation.evaluate import Evaluation

    if not isinstance(evaluation, Evaluation):
        return None
    with user_mistakes():
        told = {} if config.conditions is None else {"conditions": str(config.conditions)}
        return {**evaluation.facts(pipeline, **settings), **about_checkpoint(config, checkpoint, folder), **told}


def place_of(evaluation: Any, about: dict[str, Any] | None, config: DictConfig, folder: Path | None) -> Path:
    """The folder of the figures: the one that was named, or one for what is sampled."""
    from ldm.generation.evaluation.folder import digest

    if config.out is not None:
        return Path(config.out)
    name = f"{datetime.now():%Y%m%d-%H%M%S}" if about is None else digest(evaluation.plan(about))[:8]
    return (folder or Path()) / "evaluations" / name


def measured(
    evaluation: Any,
    pipeline: Pipeline,
    out: Path,
    about: dict[str, Any] | None,
    *,
    tell: Tell | None,
    settings: dict[str, Any],
    config: DictConfig,
) -> dict[str, float]:
    """The figures, which are in the folder then; the experiment's own evaluation may be of any kind."""
    from ldm.generation.evaluation.evaluate import Subject
    from ldm.generation.evaluation.told import evaluate_told
    from ldm.generation.evaluation.workers import FreeWorkers

    if about is None:
        return cast("dict[str, float]", evaluation(pipeline, out, **settings))
    with user_mistakes():
        say(
            f"evaluation: {shown(out.absolute())}; the same command goes on there, here or beside this one", style="dim"
        )
        write_config(out, config)
        workers = FreeWorkers(progress())
        if tell is not None:
            subject = Subject(out, pipeline.device, about, workers)
            return evaluate_told(evaluation, pipeline, tell, subject, settings=settings)
        found = evaluation(pipeline, out, about=about, workers=workers, **settings)
        return cast("dict[str, float]", found)


def lay_training_beside(
    evaluation: Evaluation, out: Path, config: DictConfig, folder: Path | None, pipeline: Pipeline | None
) -> None:
    """Keeps features of training images for the page, where they are known, so that it shows neighbours among them."""
    import torch

    from ldm.cli.sampling import usable_device
    from ldm.generation.evaluation.training_images import keep_beside
    from ldm.generation.evaluation.workers import FreeWorkers

    with user_mistakes():
        training = find_training(config, folder, pipeline)
        if training is not None:
            device = torch.device(usable_device(own_device(config.device)))
            keep_beside(evaluation, training, out, device=device, workers=FreeWorkers(progress()))


def find_telling(evaluation: Any, pipeline: Pipeline, config: DictConfig, folder: Path | None) -> Tell:
    """How the samples of the split `conditions` tell the network what their pictures are made of.

    Raises:
        UserError: the model's own config names no data, or its evaluation is of another kind than ours.
    """
    from ldm.generation.evaluation.evaluate import Evaluation
    from ldm.generation.evaluation.told import telling

    if not isinstance(evaluation, Evaluation):
        raise UserError("conditions: got one with the model's own evaluation; set metrics=[fid]")
    with user_mistakes():
        data = own_node(config, folder, "data")
        if data is None:
            raise UserError("conditions: got a model whose own config names no data, expected a run folder's")
        return telling(evaluation, pipeline, build(data), split=str(config.conditions))


def find_evaluation(config: DictConfig, folder: Path | None) -> DictConfig:
    """The chosen evaluation, or the one in the run's own config.

    Raises:
        UserError: there is neither.
    """
    with user_mistakes():
        own = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "evaluation") if folder else None
    if own is not None:
        with user_mistakes():
            check_targets(OmegaConf.to_container(own), trust=list(config.trust))
    chosen = config.evaluation
    if chosen and "_target_" not in chosen and own:
        # ++evaluation.prompts.num_samples=100 changes one thing of the run's own.
        chosen = OmegaConf.merge(own, chosen)
    found = chosen or own
    if not found:
        raise UserError("metrics: got none, and the model's own config has no evaluation; set metrics=[fid,clip_score]")
    return DictConfig(found)


def write_config(out: Path, config: DictConfig) -> None:
    """Puts the command's config beside the figures."""
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, out / "config.yaml", resolve=True)


def progress() -> Callable[[str, int, int], None]:
    """Says how far the work is, at most every few seconds."""
    last: dict[str, float] = {}

    def report(name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - last.get(name, -SECONDS_BETWEEN_REPORTS) >= SECONDS_BETWEEN_REPORTS:
            last[name] = now
            if total > 1:
                # The features of real images are in a folder that their hash names.
                kind = "sampled" if name == "samples" else "real images seen" if len(name) == 32 else "images seen"
                say(f"  {kind}: {done} of {total} parts", style="dim")

    return report
