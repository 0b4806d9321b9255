"""One door for files of other projects: whatever they are, a model in our parts comes out."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch

from ldm.interop.compvis import check_average, read_compvis
from ldm.interop.diffusers import INDEX, is_diffusers, read_diffusers
from ldm.interop.families import EPSILON
from ldm.interop.model import PretrainedModel
from ldm.interop.native import TARGET, read_ldm
from ldm.interop.safe_load import read_file


def open_model(
    path: Path | str,
    *,
    prediction: str | None = None,
    family: str | None = None,
    config: Path | str | None = None,
    ema: bool = True,
    base: Path | str | None = None,
) -> PretrainedModel:
    """A model of another project, in evaluation mode on the CPU, in the precision of its file and mapped from it.

    Args:
        path: a CompVis or Stability file (.safetensors, .ckpt), a folder of diffusers, or a file by `write_ldm`.
        prediction: epsilon, v or x_0, where the file does not say it or says it wrongly.
        family: a name of `families.FAMILIES`, where structure does not tell it.
        config: the yaml of a single file; None takes the one of the same name beside it, if there is one.
        ema: take the moving average of the U-Net where a single file holds one; false asks for the plain weights
            beside it.
        base: a model whose text encoder or autoencoder are taken where the file or folder has none.

    Raises:
        FileNotFoundError: there is nothing at a path.
        ValueError: what lies there is no such model, or a setting has no effect on it, in one line: what it is, what
            was expected, what to do.
    """
    path = Path(path).expanduser()
    based = None if base is None else _base(Path(base).expanduser())
    if path.is_dir():
        if not is_diffusers(path):
            raise ValueError(f"got {path}, a folder without {INDEX}, expected a folder of diffusers or a single file")
        _refuse(path, config=config)
        check_average(path, ema=ema, there=False)
        return read_diffusers(path, prediction=prediction, family=family, base=based)
    file = read_file(path)
    if file.metadata.get("target") == TARGET:
        _refuse(path, prediction=prediction, family=family, config=config, base=base)
        check_average(path, ema=ema, there=False)
        return read_ldm(path, file.state, json.loads(file.metadata["config"]))
    yaml = None if config is None else Path(config).expanduser()
    return read_compvis(path, file, prediction=prediction, family=family, config=yaml, ema=ema, base=based)


def is_foreign(path: Path) -> bool:
    """Whether a path is for `open_model`: a folder of diffusers, or a file that no run of ours wrote.

    Raises:
        ValueError: a safetensors file that cannot be read.
    """
    if path.is_dir():
        return is_diffusers(path)
    if path.suffix == ".safetensors":
        target = read_file(path).metadata.get("target", TARGET)
        return target == TARGET
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError):
        return True  # reading it properly says what is wrong
    return not (isinstance(content, dict) and {"config", "state_dict"} <= content.keys())


def _base(path: Path) -> PretrainedModel:
    """A model for its parts: what its own network predicts is used nowhere, so nobody has to know it."""
    is_own = path.is_file() and read_file(path).metadata.get("target") == TARGET
    return open_model(path, prediction=None if is_own else EPSILON)


def _refuse(path: Path, **settings: object) -> None:
    """Raises ValueError for a setting that would have no effect."""
    given = [name for name, value in settings.items() if value is not None]
    if given:
        raise ValueError(f"got {given[0]}= for {path}, which says all that itself; leave {given[0]} out")
