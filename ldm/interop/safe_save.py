"""Writes safetensors files whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_file(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes tensors to a .safetensors file, beside its final name first.

    Args:
        dtype: precision of all floating-point tensors; None leaves each as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        # safetensors makes files that only their owner can read: the mode is that of any new file instead.
        partial.touch()
        mode = partial.stat().st_mode
        plain = {name: _plain(value, dtype) for name, value in state.items()}
        save_file(plain, partial, {"format": "pt", **(metadata or {})})
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _plain(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    value = value.detach().cpu()
    return (value.to(dtype) if dtype and value.is_floating_point() else value).contiguous()
