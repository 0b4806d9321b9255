"""A run folder, a checkpoint or a weights file becomes a model again, whoever wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ldm.cli.build import build
from ldm.cli.foreign import pipeline_of
from ldm.cli.run_folder import newest_checkpoint, run_folder_of
from ldm.cli.sampling import usable_device
from ldm.cli.trust import check_targets
from ldm.generation import Pipeline
from ldm.interop import is_foreign, open_model
from ldm.interop.lora import apply_lora
from ldm.interop.textual_inversion import apply_embedding
from ldm.nn.weights import read_weights
from ldm.training import LatentDiffusionModule
from ldm.training.checkpoint_folders import is_checkpoint
from ldm.training.checkpoint_parts import read_model
from ldm.training.frozen import restore_frozen
from ldm.training.precomputed import use_text_files


def load(
    path: Path | str,
    *,
    device: str | None = None,
    prediction: str | None = None,
    family: str | None = None,
    config: Path | str | None = None,
    base: Path | str | None = None,
    loras: Sequence[tuple[Path | str, float]] = (),
    embeddings: Sequence[Path | str] = (),
    dtype: torch.dtype | None = torch.float32,
    trust: Sequence[str] = (),
) -> Pipeline:
    """A trained latent-diffusion model with `.sample(prompts, seeds=...) -> list of PIL images`.

    Args:
        path: a run folder, a checkpoint (.ckpt) or weights (.safetensors) of ours; or a model of another project: a
            CompVis or Stability file, or a folder of diffusers.
        device: None takes the GPU if there is one.
        prediction, family, config, base: of another project's model, what it does not tell; see
            `ldm.interop.open_model`.
        loras: files and their scales, applied in this order.
        embeddings: files of textual inversion, whose words prompts may then hold.
        dtype: of another project's weights; None leaves them as their file has them.
        trust: packages besides ldm and torch that the config saved with a model may call.

    Raises:
        FileNotFoundError: there is nothing at the path, or the autoencoder that it names is gone.
        ValueError: what lies there is not a latent-diffusion model, or says itself what was given.
    """
    path, place = Path(path).expanduser(), usable_device(device)
    told = {"prediction": prediction, "family": family, "config": config, "base": base}
    if is_foreign(path):
        pipeline = pipeline_of(
            open_model(path, prediction=prediction, family=family, config=config, base=base), dtype=dtype
        )
    elif given := [name for name, value in told.items() if value is not None]:
        raise ValueError(f"got {given[0]}= for {path}, which ldm trained and which says all itself; leave it out")
    else:
        pipeline = load_own(path, trust=trust)
    for file, scale in loras:
        apply_lora(pipeline.denoiser, pipeline.conditioner, file, scale=scale)
    for file in embeddings:
        apply_embedding(pipeline.conditioner, file)
    for part in (pipeline.denoiser, pipeline.conditioner, pipeline.autoencoder):
        part.to(place)
    return pipeline


def load_own(path: Path, *, trust: Sequence[str] = ()) -> Pipeline:
    """A model that `ldm train` wrote, on the CPU.

    Raises:
        FileNotFoundError: there is nothing at the path, or the autoencoder that it names is gone.
        ValueError: what lies there is not a latent-diffusion model.
    """
    file = weights_of(path)
    config, state = read(file)
    model = build_model(config, run_folder_of(file.absolute()), trust=trust)
    # A checkpoint is of the whole module, weights to use are of its moving average alone.
    target = model.ema.module if file.suffix == ".safetensors" else model
    target.load_state_dict(restore_frozen(target, state))
    return model.eval().pipeline()


def weights_of(path: Path) -> Path:
    """The file to load: the path itself, or the best that a run folder holds."""
    if path.is_file() or is_checkpoint(path):
        return path
    if not path.is_dir():
        raise FileNotFoundError(
            f"got {path}, where there is nothing; expected a run folder, a .ckpt or .safetensors file, or a folder of "
            "diffusers"
        )
    weights = path / "weights.safetensors"
    if weights.is_file():
        return weights
    try:
        return Path(newest_checkpoint(path))
    except ValueError as error:
        raise ValueError(
            f"got {path}, which holds no weights and no whole checkpoint (an unfinished run?); expected a run folder, "
            "a .ckpt or .safetensors file, or a folder of diffusers"
        ) from error


def read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(config, state dict) of a weights file or of a checkpoint."""
    if file.suffix == ".safetensors":
        state, _, config = read_weights(file)
        return config, state
    return read_model(file)


def build_model(config: dict[str, Any], folder: Path | None, *, trust: Sequence[str] = ()) -> LatentDiffusionModule:
    """The untrained module of a config; its autoencoder comes from the run folder, where that has a copy.

    Raises:
        ValueError: the config calls what is not trusted, or makes another module.
    """
    model = config.get("model") or {}
    check_targets(model, trust=trust)
    copy = folder / "autoencoder.safetensors" if folder else None
    if copy and copy.is_file() and "path" in (model.get("autoencoder") or {}):
        model["autoencoder"]["path"] = str(copy)
    use_text_files(model, folder)
    built = build(OmegaConf.create(model))
    if not isinstance(built, LatentDiffusionModule):
        raise ValueError(f"got a trained {type(built).__name__}, expected a LatentDiffusionModule; name another run")
    return built
