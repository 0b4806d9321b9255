"""Which model samples and how: what `ldm sample` and `ldm evaluate` share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ldm.cli.build import build
from ldm.cli.errors import UserError, user_mistakes
from ldm.cli.run_folder import latest_finished

if TYPE_CHECKING:
    from ldm.generation import Pipeline

PRECISIONS = {"32": None, "bf16": "bfloat16", "16": "float16"}


def find_checkpoint(config: DictConfig) -> Path:
    """What `checkpoint=` names, or the newest finished run that can sample.

    Raises:
        UserError: there is none.
    """
    if config.checkpoint is not None:
        path = Path(config.checkpoint).expanduser()
        if not path.exists():
            raise UserError(
                f"checkpoint: got {path}, which does not exist; expected a run folder, .ckpt or .safetensors"
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


def open_pipeline(path: Path, device: str | None) -> Pipeline:
    """Loads a model for sampling, by default onto the GPU if there is one.

    Raises:
        UserError: it cannot be loaded, or there is no such device.
    """
    from ldm.cli.load import load

    with user_mistakes():
        return load(path, device=usable_device(device))


def usable_device(device: str | None) -> str:
    """The device itself, or for None the GPU if there is one.

    Raises:
        UserError: this machine, or its torch, has no such device.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: got {device}, which torch cannot use here; expected cpu, cuda or cuda:1") from error
    return device


def chosen_settings(config: DictConfig, pipeline: Pipeline) -> dict[str, Any]:
    """Settings of sampling that the command changes; the rest stays as the model was trained to be sampled."""
    chosen: dict[str, Any] = {"num_steps": config.steps, "image_size": config.get("image_size")}
    for part in ("sampler", "discretization"):
        chosen[part] = build(config[part]) if config.get(part) else None
    chosen["guidance"] = _guidance(config.guidance, pipeline)
    return {name: value for name, value in chosen.items() if value is not None}


@contextmanager
def in_precision(precision: str, pipeline: Pipeline) -> Iterator[None]:
    """Runs the model in 32 bits, or in bf16 or 16 where that is safe (autocast).

    Raises:
        UserError: another precision.
    """
    import torch

    if str(precision) not in PRECISIONS:
        raise UserError(f"precision: got {precision}, expected one of {', '.join(PRECISIONS)}")
    name = PRECISIONS[str(precision)]
    dtype = getattr(torch, name) if name else None
    with torch.autocast(pipeline.device.type, dtype=dtype, enabled=dtype is not None):
        yield


def describe(settings: Any) -> dict[str, Any]:
    """Sampling settings as plain values for a record: class names, numbers."""
    guidance = {key: value for key, value in vars(settings.guidance).items() if isinstance(value, int | float)}
    return {
        "sampler": type(settings.sampler).__name__,
        "discretization": type(settings.discretization).__name__,
        "num_steps": settings.num_steps,
        "guidance": guidance,
        "image_size": settings.image_size,
    }


def _guidance(node: DictConfig, pipeline: Pipeline) -> Any:
    """The chosen guidance, or the model's own with the values that the command sets, or None: as it is."""
    if "_target_" in node:
        return build(node)
    given: dict[str, Any] = {str(key): value for key, value in node.items() if value is not None}
    if not given:
        return None
    own = pipeline.settings.guidance
    with user_mistakes():
        return type(own)(**{**vars(own), **given})
