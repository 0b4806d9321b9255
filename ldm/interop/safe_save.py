"""Writes safetensors files whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.files import replacing

# Scalars between an encoder's values and latents: whoever rounds them changes everything that the network sees.
EXACT = ("scale_factor", "latent_scale", "latent_shift")


def write_file(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes tensors to a .safetensors file.

    Args:
        dtype: precision of all floating-point tensors but the scale of latents; None leaves each as it is.
    """
    plain = {name: cast(name, value.detach().cpu(), dtype).contiguous() for name, value in state.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, {"format": "pt", **(metadata or {})})


def cast(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in the precision to write it in; None, and what is `EXACT`, leave it as it is."""
    keeps = dtype is None or name.rpartition(".")[2] in EXACT or not value.is_floating_point()
    return value if keeps else value.to(dtype)
