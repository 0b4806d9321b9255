"""What an evaluation is built from: metrics, prompts, reference and the description of the model, by config."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from ldm.cli.build import build
from ldm.cli.errors import UserError, user_mistakes
from ldm.cli.sampling import read_embeddings, read_loras, told_of_model
from ldm.cli.trust import check_targets

if TYPE_CHECKING:
    from ldm.generation import Pipeline
    from ldm.generation.evaluation.evaluate import Evaluation

VALIDATION = "validation"


def evaluation_of(config: DictConfig, folder: Path | None, pipeline: Pipeline | None) -> Evaluation:
    """The evaluation that the command's settings describe.

    Args:
        folder: the model's run folder, where it has one.
        pipeline: the model, or None for images.

    Raises:
        UserError: there are no prompts, or a setting is wrong.
    """
    from ldm.generation.evaluation.evaluate import Evaluation
    from ldm.generation.evaluation.measurement import needs_real

    with user_mistakes():
        metrics = {str(name): build(node) for name, node in config.metric.items()}
        prompts, source = find_prompts(config, folder, pipeline) if pipeline else ([{"prompt": ""}], None)
        wants_real = config.reconstruct is not None or any(map(needs_real, metrics.values()))
        reference = find_reference(config, folder) if wants_real else None
        return Evaluation(
            metrics=metrics,
            prompts=prompts,
            prompts_source=source,
            reference=reference,
            num_samples=config.num_samples,
            seed=config.seed,
            batch_size=config.batch_size,
            negative_prompt=config.negative_prompt,
            shard_size=config.shard_size,
            feature_batch_size=config.feature_batch_size,
            num_workers=config.num_workers,
            resolution=resolution_of(config, pipeline),
            reference_cache=config.reference_cache,
            bad_images=config.bad_images,
        )


def find_prompts(
    config: DictConfig, folder: Path | None, pipeline: Pipeline
) -> tuple[list[dict[str, Any]], str | None]:
    """(prompts with labels, where they come from): those of the command, the model's classes, or the run's own.

    Raises:
        UserError: there are none, or a model without words is asked for an unknown number of samples.
        ValueError: the file cannot be read.
    """
    from ldm.generation.evaluation.prompts import caption_prompts, own_prompts, read_prompts

    if config.get("conditions") is not None:
        # Their captions take the place of these.
        return [{"prompt": ""}], None
    if config.prompts not in (None, VALIDATION):
        return read_prompts(config.prompts), str(config.prompts)
    classes = own_prompts(pipeline.conditioner) if config.prompts is None else None
    if classes is not None:
        if config.num_samples is None:
            raise UserError("num_samples: got none for a model without words, expected a number; set num_samples=50000")
        return classes, "none" if len(classes) == 1 else "every class"
    own = own_node(config, folder, "evaluation.prompts")
    if own is not None and config.prompts is None:
        return build(own) if OmegaConf.is_dict(own) else cast(Any, OmegaConf.to_container(own)), "the run's evaluation"
    data = own_node(config, folder, "data")
    if data is None:
        raise UserError(
            "prompts: got none, and the model's own config names no data with captions; set prompts=FILE, such as "
            "captions_val2014.json of COCO"
        )
    return caption_prompts(build(data), VALIDATION), "validation captions of the run's data"


def find_reference(config: DictConfig, folder: Path | None) -> Any:
    """What the real images come from: the command's path, the run's evaluation's, or its data; None where unknown."""
    if config.reference is not None:
        return str(Path(config.reference).expanduser())
    for key in ("evaluation.reference", "data"):
        node = own_node(config, folder, key)
        if node is not None:
            return build(node)
    return None


def find_training(config: DictConfig, folder: Path | None, pipeline: Pipeline | None) -> Any:
    """The images that the model was trained on, to look for neighbours in: those that were named, or the run's own.

    None where the page is to show no neighbours, or the run knows no training images, as one on latents does not.
    """
    if config.report is None or not (config.report.neighbours and config.report.per_sample):
        return None
    from ldm.data import ShardDataset
    from ldm.generation.evaluation.images import SplitImages, open_images

    if config.report.training is not None:
        return open_images(str(config.report.training), resolution=resolution_of(config, pipeline))
    for key in ("data", "evaluation.reference"):
        source: Any = build(node) if OmegaConf.is_dict(node := own_node(config, folder, key)) else None
        if "train" not in getattr(source, "paths", {}):
            continue
        found = source.dataset("train")
        if isinstance(found, ShardDataset) and found.payload == "image":
            return SplitImages(source, "train")
    return None


def own_node(config: DictConfig, folder: Path | None, key: str) -> Any:
    """A node of the run's own config, checked as one that came with a checkpoint, or None."""
    if folder is None:
        return None
    node = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), key)
    if OmegaConf.is_config(node):
        check_targets(OmegaConf.to_container(node), trust=list(config.trust))
    return node


def resolution_of(config: DictConfig, pipeline: Pipeline | None) -> int | None:
    """Pixels to which images of files are brought: the command's, else a model's size where it is square."""
    if config.resolution is not None or pipeline is None:
        return cast("int | None", config.resolution)
    height, width = pipeline.settings.size
    return height if height == width else None


def about_checkpoint(config: DictConfig, checkpoint: Path, folder: Path | None) -> dict[str, Any]:
    """What a protocol says of the model's file, of its average, and of what was laid over it."""
    from ldm.cli.load import weights_of
    from ldm.interop import is_foreign
    from ldm.metrics.weights import sha256_of

    file = checkpoint if is_foreign(checkpoint) else weights_of(checkpoint)
    step = re.search(r"step=?0*(\d+)", file.name)
    return {
        "checkpoint": {"path": str(file.absolute()), "sha256": sha256_of(file), "step": int(step[1]) if step else None},
        "ema": ema_of(file, folder),
        "precision": str(config.precision),
        **told_of_model(config),
        "lora": [list(item) for item in read_loras(config.lora)],
        "embedding": read_embeddings(config.embedding),
    }


def ema_of(file: Path, folder: Path | None) -> Any:
    """How long the average is: the decay, what `ldm ema` says of one that it made, or None where nobody says."""
    if file.suffix == ".safetensors" and folder is not None:
        import json

        from safetensors import safe_open

        with safe_open(file, framework="pt") as stored:
            own = json.loads((stored.metadata() or {}).get("config", "{}"))
        if "post_hoc_ema" in own:
            return own["post_hoc_ema"]
    return OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "model.ema_decay") if folder else None


def evaluate_at_end(evaluation: Any, pipeline: Pipeline, folder: Path) -> dict[str, float]:
    """Measures what was trained into folder/evaluations/final; its figures and grid also come into the run folder.

    An evaluation of another kind than ours writes into the run folder itself.
    """
    from ldm.generation.evaluation.evaluate import Evaluation
    from ldm.generation.evaluation.folder import RESULT, holds_another

    if not isinstance(evaluation, Evaluation):
        return cast("dict[str, float]", evaluation(pipeline, folder))
    place = folder / "evaluations" / "final"
    about = evaluation.facts(pipeline)
    if holds_another(place, evaluation.plan(about)):
        # Of an end of this run that was taken back.
        shutil.rmtree(place)
    figures = evaluation(pipeline, place, about=about)
    for name in (RESULT, "evaluation.png"):
        shutil.copyfile(place / name, folder / name)
    return figures


def folder_of_images(config: DictConfig) -> Path:
    """evaluations/<eight digits of what is measured> in the current folder."""
    text = f"{Path(config.images).expanduser().absolute()} {config.resolution} {config.shard_size}"
    return Path("evaluations") / hashlib.sha256(text.encode()).hexdigest()[:8]


def folder_of_reconstructions(config: DictConfig, file: Path) -> Path:
    """evaluations/reconstructions-<eight digits of what is reconstructed, and by what> beside the autoencoder."""
    reference = config.reference and Path(config.reference).expanduser().absolute()
    text = f"{sha256_of_file(file)} {reference} {config.resolution} {config.shard_size}"
    return file.parent / "evaluations" / f"reconstructions-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def autoencoder_file(config: DictConfig) -> Path:
    """The file that `reconstruct=` names, itself or by its run folder.

    Raises:
        UserError: there is none.
    """
    path = Path(str(config.reconstruct)).expanduser()
    file = path / "autoencoder.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"reconstruct: got {path}, expected a run folder of an autoencoder, or its autoencoder.safetensors; check "
            "the path"
        )
    return file


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def own_device(device: str | None) -> str | None:
    """The device that was named, or, where several processes share this machine, this one's own GPU."""
    import torch

    from ldm.generation.executors import worker_number

    count = torch.cuda.device_count()
    return device if device is not None or not count else f"cuda:{worker_number() % count}"
