"""Self-describing weights: one safetensors file that also says which module it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.files import replacing


def save_weights(path: Path | str, state_dict: Mapping[str, Tensor], *, target: str, config: Mapping[str, Any]) -> None:
    """Writes a state dict together with the class and the constructor arguments that rebuild its module.

    A reader never sees half of the file.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"target": target, "config": json.dumps(dict(config))})


def read_weights(path: Path | str) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Reads what `save_weights` wrote: (state dict, target, config).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not safetensors, or does not say what it belongs to.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"got no weights at {path}, expected a .safetensors file; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"got {path}, which is damaged or not safetensors ({error}); write it again") from error
    if "target" not in metadata:
        raise ValueError(f"got {path} without a description of its module, expected a file written by ldm")
    return tensors, metadata["target"], json.loads(metadata["config"])
