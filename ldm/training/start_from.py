"""Weights to begin with: a stage of a chain takes over what the stage before it learned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.nn.weights import read_weights
from ldm.training.autoencoder import AutoencoderModule
from ldm.training.frozen import drop_frozen
from ldm.training.latent_diffusion import LatentDiffusionModule

WEIGHTS, AUTOENCODER = "weights.safetensors", "autoencoder.safetensors"
# Of a network's embedding of a vector, all and the last layer.
VECTOR, LAST = "denoiser.network.label_emb.0.", "denoiser.network.label_emb.0.2."


def start_from(module: pl.LightningModule, place: Path | str) -> list[str]:
    """Puts the weights of a finished run into an untrained module of the same kind, and into its moving average.

    A weight that has grown by input channels keeps its values for the old ones and is zero for the new, so that the
    model begins as the one before: an inpainting, depth or edit model of a text model (Rombach et al. 2022; Stable
    Diffusion 2 `insert_new_channels`). So does the embedding of a vector that the one before was not told: its last
    layer is zero.

    Args:
        place: a run folder, or a weights file that a run wrote.

    Returns:
        The names of the weights that have grown, and of the layer that is zero.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names or shapes differ otherwise, or the module is of another kind.
    """
    if isinstance(module, AutoencoderModule):
        return _fill([module.autoencoder], _read(Path(place), AUTOENCODER))
    if not isinstance(module, LatentDiffusionModule):
        raise ValueError(f"start_from: got a {type(module).__name__}, expected a latent diffusion model or autoencoder")
    return _fill([module.trained, module.ema.module], _read(Path(place), WEIGHTS))


def _read(place: Path, name: str) -> dict[str, Tensor]:
    state, _, _ = read_weights(place / name if place.is_dir() else place)
    return state


def _fill(modules: list[Any], state: Mapping[str, Tensor]) -> list[str]:
    wanted = drop_frozen(modules[0], modules[0].state_dict())
    zero = []
    if not any(name.startswith(VECTOR) for name in state):
        zero = [name for name in wanted if name.startswith(LAST)]
        new = {name: value for name, value in wanted.items() if name.startswith(VECTOR)}
        state = {**state, **new, **{name: torch.zeros_like(wanted[name]) for name in zero}}
    missing, strange = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if missing or strange:
        raise ValueError(
            f"start_from: got weights without {len(missing)} of the model's ({', '.join(missing[:3])}) and with "
            f"{len(strange)} that it has not ({', '.join(strange[:3])}), expected the same; start from the stage before"
        )
    grown = [name for name, value in wanted.items() if value.shape != state[name].shape]
    filled = {name: _widened(name, value, wanted[name]) if name in grown else value for name, value in state.items()}
    for module in modules:
        module.load_state_dict(filled, strict=False)
    return [*grown, *zero]


@torch.no_grad()
def _widened(name: str, value: Tensor, wanted: Tensor) -> Tensor:
    """The value with zeros for the input channels that it lacks."""
    same = value.dim() == wanted.dim() == 4 and (*value.shape[:1], *value.shape[2:]) == (
        *wanted.shape[:1],
        *wanted.shape[2:],
    )
    if not same or value.shape[1] > wanted.shape[1]:
        raise ValueError(
            f"start_from: got {name} of shape {tuple(value.shape)}, expected {tuple(wanted.shape)}, or fewer input "
            "channels; start from a model of the same geometry"
        )
    whole = torch.zeros_like(wanted)
    whole[:, : value.shape[1]] = value
    return whole
