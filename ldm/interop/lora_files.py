"""The file formats of LoRA: kohya's (sd-scripts), diffusers' and peft's, read into one form and written from it.

Every layer gets the name that kohya gives it, with underscores for dots: `lora_unet_<layer>`, `lora_te1_<layer>` and
`lora_te2_<layer>` for the U-Net, the first and the second text encoder; `lora_te_` is `lora_te1_`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.interop.safe_load import read_file

# Endings of tensor names, and what the tensor is to its layer.
ROLES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora.alpha": "alpha",
    "_lora.alpha": "alpha",
    ".alpha": "alpha",
}
# diffusers' names of the models, in the order of the prefixes that they stand for.
MODELS = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
# What diffusers called the projections of attention before it used peft.
OLD_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# Names under which tools save a LoRA in a folder.
FILE_NAMES = ("lora.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")
METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adds to one layer's weight: `up @ down * alpha / rank`.

    Args:
        down: (rank, in) of a linear layer, (rank, in, kh, kw) of a convolution.
        up: (out, rank), or (out, rank, 1, 1).
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return len(self.down)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it adds to."""
        return (len(self.up), *self.down.shape[1:])


def read_lora(path: Path | str) -> dict[str, LowRank]:
    """Reads a file, or the LoRA in a folder: its layers by kohya's names.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or holds anything but LoRA layers; names the first such tensor.
    """
    path = find_lora(Path(path))
    file = read_file(path)
    alphas = _StatedAlphas.of(path, file.metadata)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.state.items():
        layer, role = _parse(name, path)
        layers.setdefault(layer, {})[role] = tensor
    return {kohya_name(layer): _low_rank(layer, parts, alphas, path) for layer, parts in layers.items()}


def find_lora(path: Path) -> Path:
    """The path itself, or the LoRA file in the folder that it is.

    Raises:
        FileNotFoundError: the folder holds none.
    """
    if not path.is_dir():
        return path
    for name in FILE_NAMES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"got {path}, a folder without {' or '.join(FILE_NAMES)}; name the LoRA file itself")


def kohya_name(layer: str) -> str:
    """The name with underscores, of a layer's name in any of the formats."""
    if layer.startswith("lora_"):
        return "lora_te1_" + layer.removeprefix("lora_te_") if layer.startswith("lora_te_") else layer
    model, rest = split_model(layer)
    rest = rest.replace(".processor.", ".")
    head, _, last = rest.rpartition(".")
    if model != "unet" and last in OLD_NAMES:
        rest = f"{head}.{OLD_NAMES[last]}"
    elif last == "to_out":
        rest = f"{rest}.0"
    return MODELS[model] + rest.replace(".", "_")


def split_model(layer: str) -> tuple[str, str]:
    """(unet, text_encoder or text_encoder_2, the rest) of a dotted name; one without a model is the U-Net's."""
    layer = layer.removeprefix("base_model.model.")
    model, _, rest = layer.partition(".")
    return (model, rest) if model in MODELS else ("unet", layer)


def kohya_tensors(layers: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The tensors of a file in kohya's format, of layers by kohya's names."""
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_down.weight"] = layer.down
        tensors[f"{name}.lora_up.weight"] = layer.up
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha, dtype=layer.down.dtype)
    return tensors


def diffusers_tensors(layers: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The tensors of a file in diffusers' format, of layers by diffusers' names; alpha is multiplied into `up`."""
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.down
        tensors[f"{name}.lora_B.weight"] = layer.up * (layer.alpha / layer.rank)
    return tensors


def _parse(name: str, path: Path) -> tuple[str, str]:
    """(layer, role) of a tensor's name."""
    for ending, role in ROLES.items():
        if name.endswith(ending):
            return name.removesuffix(ending), role
    raise ValueError(
        f"got {path} with {name}, expected pairs of lora_down and lora_up (kohya) or lora_A and lora_B (diffusers, "
        "peft); other kinds of adapters (LoHa, LoKr, DoRA) and whole models are not LoRA"
    )


def _low_rank(layer: str, parts: Mapping[str, Tensor], alphas: _StatedAlphas, path: Path) -> LowRank:
    if not {"down", "up"} <= parts.keys():
        raise ValueError(f"got {path} with {layer} of {', '.join(sorted(parts))} alone, expected its down and up")
    down, up = parts["down"], parts["up"]
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != len(parts.get("mid", down)):
        raise ValueError(
            f"got {path} with {layer} of shapes {tuple(up.shape)} and {tuple(down.shape)}, expected (out, rank) and "
            "(rank, in)"
        )
    if "mid" in parts:
        # LoCon's Tucker form: the two convolutions on the way in are one of the kernel's size.
        down = torch.einsum("r s h w, s i -> r i h w", parts["mid"], down.flatten(1))
    alpha = parts["alpha"].item() if "alpha" in parts else alphas.of_layer(layer, len(down))
    return LowRank(down, up, float(alpha))


@dataclass(frozen=True)
class _StatedAlphas:
    """The alphas that peft's config states, in the file's own metadata or in adapter_config.json beside it."""

    configs: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, str]) -> _StatedAlphas:
        configs: dict[str, dict[str, Any]] = {}
        for name, value in json.loads(metadata.get(METADATA, "{}")).items():
            model, setting = split_model(name)
            configs.setdefault(model, {})[setting] = value
        beside = path.with_name("adapter_config.json")
        if not configs and path.name.startswith("adapter_model") and beside.is_file():
            configs["unet"] = json.loads(beside.read_text())
        return cls(configs)

    def of_layer(self, layer: str, rank: int) -> float:
        """The alpha of a layer: what its model's config says, or else its rank, which scales by 1."""
        model, name = split_model(layer)
        config = self.configs.get(model, {})
        pattern = config.get("alpha_pattern") or {}
        matching = (value for key, value in pattern.items() if name == key or name.endswith(f".{key}"))
        alpha = float(next(matching, config.get("lora_alpha", rank)))
        return alpha * rank**0.5 if config.get("use_rslora") else alpha
