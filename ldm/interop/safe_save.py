"""Writes safetensors files whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

# Scalars between an encoder's values and latents: whoever rounds them changes everything that the network sees.
EXACT = ("scale_factor", "latent_scale", "latent_shift")


def write_file(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes tensors to a .safetensors file, beside its final name first.

    Args:
        dtype: precision of all floating-point tensors but the scale of latents; None leaves each as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        # safetensors makes files that only their owner can read: the mode is that of any new file instead.
        partial.touch()
        mode = partial.stat().st_mode
        plain = {name: cast(name, value.detach().cpu(), dtype).contiguous() for name, value in state.items()}
        save_file(plain, partial, {"format": "pt", **(metadata or {})})
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def cast(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in the precision to write it in; None, and what is `EXACT`, leave it as it is."""
    keeps = dtype is None or name.rpartition(".")[2] in EXACT or not value.is_floating_point()
    return value if keeps else value.to(dtype)
