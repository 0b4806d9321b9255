"""Which model samples and how: what `ldm sample` and `ldm evaluate` share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

import ldm
from ldm.cli.build import build
from ldm.cli.compose import is_number
from ldm.cli.errors import UserError, user_mistakes
from ldm.cli.run_folder import latest_finished

if TYPE_CHECKING:
    from ldm.generation import Memory, Pipeline, SamplingSettings

HALF = "half"
# The type that autocast computes in.
PRECISIONS = {"32": None, "bf16": "bfloat16", "16": "float16", HALF: None}


def find_checkpoint(config: DictConfig) -> Path:
    """What `checkpoint=` names, or the newest finished run that can sample.

    Raises:
        UserError: there is none.
    """
    if config.checkpoint is not None:
        path = Path(config.checkpoint).expanduser()
        if not path.exists():
            raise UserError(
                f"checkpoint: got {path}, which does not exist; expected a run folder, .ckpt, .safetensors or a "
                "diffusers folder"
            )
        return path
    runs = Path(config.paths.runs).expanduser()
    found = latest_finished(runs, accept=can_sample)
    if found is None:
        raise UserError(
            f"no finished run under {runs.absolute()} can sample; run `ldm train` first, or give checkpoint=..."
        )
    return found


def can_sample(folder: Path) -> bool:
    """Whether a run trained something that makes pictures: only such experiments choose a sampler."""
    config = folder / "config.yaml"
    return config.is_file() and OmegaConf.select(OmegaConf.load(config), "sampler") is not None


def open_pipeline(
    path: Path, device: str | None, *, memory: Memory | None = None, half: bool = False, **reading: Any
) -> Pipeline:
    """Loads a model for sampling, by default onto the GPU if there is one.

    Args:
        memory: what is done to fit it into a small memory.
        half: weights of 16 bits.
        reading: what `load` is told besides, of files that do not say it themselves.

    Raises:
        UserError: it cannot be loaded, or there is no such device.
    """
    from ldm.cli.load import load

    with user_mistakes():
        place, path = usable_device(device), model_at(path)
        if memory is None:
            return load(path, device=place, **reading)
        # What is to be halved, or to wait in main memory, never is on the device as a whole.
        if half:
            reading["dtype"] = None  # as the file has them: a float32 copy would be twice as large
        pipeline = load(path, device="cpu" if half or memory.offload else place, **reading)
        return pipeline.placed(place, memory=memory, half=half)


def model_at(path: Path) -> Path:
    """The path itself, or the weights that a run folder holds.

    Raises:
        UserError: a folder without a model.
    """
    from ldm.cli.load import weights_of
    from ldm.interop import is_foreign

    if not path.is_dir() or is_foreign(path):
        return path
    try:
        return weights_of(path)
    except ValueError as error:
        raise UserError(f"checkpoint: {error}") from error


def open_chosen(path: Path, config: DictConfig) -> Pipeline:
    """`open_pipeline` as a command's settings say.

    Raises:
        UserError: also for a precision that there is not, a LoRA that is no path or [path, scale], or an embedding
            that is no path.
    """
    check_precision(config.precision)
    given = {
        **told_of_model(config),
        "loras": read_loras(config.lora),
        "embeddings": read_embeddings(config.embedding),
        "trust": list(config.trust),
    }
    return open_pipeline(path, config.device, memory=build(config.memory), half=str(config.precision) == HALF, **given)


def told_of_model(config: DictConfig) -> dict[str, str]:
    """What the command says of a model that does not say it itself."""
    return {name: str(config[name]) for name in ("prediction", "family", "config", "base") if config[name] is not None}


def read_loras(value: Any) -> list[tuple[str, float]]:
    """(path, scale) of each LoRA, of one or of a list of them; a path alone has scale 1.

    Raises:
        UserError: something else.
    """
    loras = [(item, 1.0) if isinstance(item, str) else item for item in _items(value, is_one=_is_scaled)]
    if not all(map(_is_scaled, loras)):
        raise UserError(f"lora: got {value}, expected a file, [file, scale], or a list of these")
    return [(path, float(scale)) for path, scale in loras]


def read_embeddings(value: Any) -> list[str]:
    """The files of textual inversion.

    Raises:
        UserError: something else than a path or a list of them.
    """
    paths = _items(value)
    if not all(isinstance(path, str) for path in paths):
        raise UserError(f"embedding: got {value}, expected a file, or a list of files")
    return paths


def _items(value: Any, *, is_one: Callable[[Any], bool] = lambda value: False) -> list[Any]:
    """The entries of a list, or a single value as the only one, or none for None; a list may be one entry."""
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if plain is None:
        return []
    return plain if isinstance(plain, list) and not is_one(plain) else [plain]


def _is_scaled(item: Any) -> bool:
    """Whether this is a path and a number."""
    is_pair = isinstance(item, list | tuple) and len(item) == 2
    return is_pair and isinstance(item[0], str) and is_number(item[1])


def usable_device(device: str | None) -> str:
    """The device itself, or for None the GPU if there is one.

    Raises:
        ValueError: this machine, or its torch, has no such device.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: got {device}, which torch cannot use here; expected cpu, cuda or cuda:1") from error
    return device


def chosen_settings(config: DictConfig, pipeline: Pipeline) -> dict[str, Any]:
    """Settings of sampling that the command changes; the rest stays as the model was trained to be sampled.

    Raises:
        UserError: steps or a part of guidance is no number.
    """
    check_positive(config, "steps")
    check_guidance(config.guidance)
    size = config.get("image_size")
    chosen: dict[str, Any] = {"num_steps": config.steps, "image_size": list(size) if OmegaConf.is_list(size) else size}
    for part in ("sampler", "discretization"):
        chosen[part] = build(config[part]) if config.get(part) else None
    chosen["guidance"] = _guidance(config.guidance, pipeline, trust=config.trust)
    return {name: value for name, value in chosen.items() if value is not None}


def check_positive(config: DictConfig, *names: str) -> None:
    """Raises UserError for a setting that is there and no positive integer."""
    for name in names:
        value = config[name]
        if value is not None and not (isinstance(value, int) and is_number(value) and value > 0):
            raise UserError(f"{name}: got {value}, expected a positive integer")


def check_guidance(node: DictConfig) -> None:
    """Raises UserError for a scale or rescale that is no number, or an interval that is not two."""
    for name in ("scale", "rescale", "classifier_scale"):
        if node.get(name) is not None and not is_number(node[name]):
            raise UserError(f"guidance.{name}: got {node[name]}, expected a number")
    interval = node.get("interval")
    is_pair = OmegaConf.is_list(interval) and len(interval) == 2 and all(map(is_number, interval))
    if interval is not None and not is_pair:
        raise UserError(f"guidance.interval: got {interval}, expected two noise levels: [lowest,highest]")


@contextmanager
def in_precision(precision: str, pipeline: Pipeline) -> Iterator[None]:
    """Runs the model as its weights are, or in bf16 or 16 where that is safe (autocast).

    Raises:
        UserError: another precision.
    """
    import torch

    check_precision(precision)
    name = PRECISIONS[str(precision)]
    dtype = getattr(torch, name) if name else None
    with torch.autocast(pipeline.device.type, dtype=dtype, enabled=dtype is not None):
        yield


def check_precision(precision: object) -> None:
    """Raises UserError for a precision that there is not."""
    if str(precision) not in PRECISIONS:
        raise UserError(f"precision: got {precision}, expected one of {', '.join(PRECISIONS)}")


def record(config: DictConfig, settings: SamplingSettings, checkpoint: Path) -> dict[str, Any]:
    """All that decides a command's pictures besides prompts and seeds, as plain values.

    Files among the task's settings are named by their content's hash too.
    """
    task: dict[str, Any] = _options(config.task)
    return {
        "task": task,
        "files": {name: _sha256(value) for name, value in task.items() if _is_file(value)},
        **describe(settings),
        "postprocess": [_options(node) for node in config.postprocess.values()],
        "memory": _options(config.memory),
        "precision": str(config.precision),
        "checkpoint": str(checkpoint),
        **told_of_model(config),
        "lora": read_loras(config.lora),
        "embedding": read_embeddings(config.embedding),
        "ldm": ldm.__version__,
    }


def describe(settings: SamplingSettings) -> dict[str, Any]:
    """Sampling settings as plain values: class names, numbers."""
    from ldm.generation.evaluation.protocol import plain

    return {
        "sampler": type(settings.sampler).__name__,
        "sampler_options": plain(settings.sampler),
        "discretization": type(settings.discretization).__name__,
        "discretization_options": plain(settings.discretization),
        "num_steps": settings.num_steps,
        "guidance": plain(settings.guidance),
    }


def _options(node: DictConfig) -> dict[str, Any]:
    """A node as plain values, with the name of its class in place of `_target_`."""
    values = cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))
    return {"name": values.pop("_target_").rpartition(".")[2], **values}


def _is_file(value: object) -> bool:
    return isinstance(value, str) and Path(value).expanduser().is_file()


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()


def _guidance(node: DictConfig, pipeline: Pipeline, *, trust: Sequence[str]) -> Any:
    """The chosen guidance, or the model's own with the values that the command sets, or None: as it is."""
    if "_target_" in node:
        return build(node)
    given: dict[str, Any] = {str(key): value for key, value in node.items() if value is not None}
    if not given:
        return None
    with user_mistakes():
        if given.keys() & {"guide", "classifier", "classifier_scale"}:
            from ldm.cli.guides import guidance_of

            return guidance_of(given, pipeline, trust=trust)
        own = pipeline.settings.guidance
        return type(own)(**{**vars(own), **given})
