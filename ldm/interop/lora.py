"""LoRA (Hu et al. 2022) on a U-Net and its CLIP text encoders: apply, scale, merge, write.

peft changes linear layers and convolutions. Fused attention, which open_clip has, calls none of its layers: its weights
are parametrized instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ldm.conditioners import Conditioner
from ldm.diffusion import Denoiser
from ldm.interop.lora_files import LowRank, diffusers_tensors, kohya_tensors, read_lora
from ldm.interop.lora_layers import Layer, Parts, text_encoders
from ldm.interop.safe_save import write_file

Format = Literal["kohya", "diffusers"]


class LowRankWeight(nn.Module):
    """A LoRA as a parametrization of a weight (parts * out, in), with an update of its own for each part.

    Args:
        down, up: (parts, rank, in) and (parts, out, rank).
        adapter: the LoRA's name.
    """

    def __init__(self, down: Tensor, up: Tensor, *, adapter: str, alpha: float) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.adapter, self.alpha, self.scale, self.merged = adapter, alpha, 1.0, False

    def delta(self) -> Tensor:
        """What it adds to the weight."""
        factor = self.scale * self.alpha / self.down.shape[1]
        return rearrange(self.up @ self.down, "parts out width -> (parts out) width") * factor

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return weight if self.merged else weight + self.delta().to(weight.dtype)


def apply_lora(denoiser: Denoiser, conditioner: Conditioner, path: Path | str, *, scale: float = 1.0) -> str:
    """Adds the LoRA of a file to those that the model has, frozen like the model itself; returns its name.

    Args:
        path: kohya's, diffusers' or peft's format, or a folder that holds one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no LoRA, or one for another model; names the first layer that does not fit.
    """
    parts = Parts(denoiser, conditioner)
    layers = _matched(read_lora(path), parts, path)
    unmerge(denoiser, conditioner)
    adapter = f"lora_{len(adapters(denoiser, conditioner))}"
    add_adapter(parts, layers, adapter)
    parts.requires_grad_(False)
    set_scale(denoiser, conditioner, adapter, scale)
    return adapter


def adapters(denoiser: Denoiser, conditioner: Conditioner) -> list[str]:
    """The names of a model's LoRAs, in the order in which they came."""
    found: dict[str, None] = {}
    for layer in _changed(Parts(denoiser, conditioner)):
        found |= dict.fromkeys([layer.adapter] if isinstance(layer, LowRankWeight) else layer.lora_A)
    return sorted(found, key=lambda name: (len(name), name))


def set_scale(denoiser: Denoiser, conditioner: Conditioner, adapter: str, scale: float) -> None:
    """How strongly a LoRA acts: 0 not at all, 1 as trained. Undoes `merge`.

    Raises:
        ValueError: the model has no LoRA of this name.
    """
    _check_name(adapter, denoiser, conditioner)
    unmerge(denoiser, conditioner)
    for layer in _changed(Parts(denoiser, conditioner)):
        if not isinstance(layer, LowRankWeight):
            layer.set_scale(adapter, scale)
        elif layer.adapter == adapter:
            layer.scale = scale


@torch.no_grad()
def merge(denoiser: Denoiser, conditioner: Conditioner) -> None:
    """Adds all LoRAs, scaled, into the weights, so that they cost nothing; `unmerge` takes them out to rounding."""
    for weight, layer in _parametrized(Parts(denoiser, conditioner)):
        if not layer.merged:
            weight.add_(layer.delta().to(weight.dtype))
            layer.merged = True
    for layer in _peft_layers(Parts(denoiser, conditioner)):
        layer.merge()


@torch.no_grad()
def unmerge(denoiser: Denoiser, conditioner: Conditioner) -> None:
    """Takes merged LoRAs out of the weights again."""
    for weight, layer in _parametrized(Parts(denoiser, conditioner)):
        if layer.merged:
            weight.sub_(layer.delta().to(weight.dtype))
            layer.merged = False
    for layer in _peft_layers(Parts(denoiser, conditioner)):
        if layer.merged:
            layer.unmerge()


def bake(denoiser: Denoiser, conditioner: Conditioner) -> None:
    """Merges all LoRAs for good: plain layers remain, under their old names, to be written as a whole model."""
    from peft.tuners.lora import LoraLayer

    merge(denoiser, conditioner)
    parts = Parts(denoiser, conditioner)
    for name, layer in list(parts.named_modules()):
        if isinstance(layer, LoraLayer):
            place, _, own = name.rpartition(".")
            setattr(parts.get_submodule(place), own, layer.get_base_layer())
        elif parametrize.is_parametrized(layer):
            for weight in list(layer.parametrizations):
                parametrize.remove_parametrizations(layer, weight)


def write_lora(
    denoiser: Denoiser,
    conditioner: Conditioner,
    path: Path | str,
    *,
    adapter: str | None = None,
    format: Format = "kohya",
) -> None:
    """Writes one of the model's LoRAs as a safetensors file, as trained: scales are not in it.

    Args:
        adapter: its name; None where there is only one.
        format: kohya's, which every tool reads, or diffusers'.

    Raises:
        ValueError: an unknown format or name.
    """
    if format not in get_args(Format):
        raise ValueError(f"got format={format}, expected one of {', '.join(get_args(Format))}")
    parts, (only, *others) = Parts(denoiser, conditioner), adapters(denoiser, conditioner) or [""]
    if adapter is None and (others or not only):
        raise ValueError(f"got a model with LoRAs {[only, *others] if only else 'none'}, expected one; name it")
    adapter = adapter or only
    _check_name(adapter, denoiser, conditioner)
    layers = dict(_adapted(parts, adapter))
    if format == "diffusers":
        tensors = diffusers_tensors({layer.diffusers: low_rank for layer, low_rank in layers.items()})
    else:
        tensors = kohya_tensors({_kohya(layer, parts): low_rank for layer, low_rank in layers.items()})
    write_file(Path(path), tensors)


def add_adapter(parts: Parts, layers: Mapping[Layer, LowRank], adapter: str) -> None:
    """Adds a LoRA to the layers named; all else is frozen, the LoRAs that were there too, and all of them act."""
    plain = {layer.module: low_rank for layer, low_rank in layers.items() if layer.weight is None}
    if plain:
        _inject(parts, plain, adapter)
    parts.requires_grad_(False)
    for layer in _peft_layers(parts):
        layer.set_adapter(list(layer.lora_A), inference_mode=True)
        for side in (layer.lora_A, layer.lora_B):
            if adapter in side:
                side[adapter].requires_grad_(True)
    fused = sorted((layer for layer in layers if layer.weight), key=lambda layer: (layer.module, layer.part))
    for name, group in groupby(fused, key=lambda layer: layer.module):
        _parametrize(parts.get_submodule(name), {layer: layers[layer] for layer in group}, adapter)


def _inject(parts: Parts, layers: Mapping[str, LowRank], adapter: str) -> None:
    """Has peft wrap layers, given by their names in `parts`, and puts the weights in."""
    from peft import LoraConfig, inject_adapter_in_model

    ranks = {low_rank.rank for low_rank in layers.values()}
    alphas = {low_rank.alpha for low_rank in layers.values()}
    config = LoraConfig(
        target_modules=_any_of(layers),
        # One pattern for all layers of a rank: peft tries the patterns one by one for every layer.
        rank_pattern={_any_of(n for n, item in layers.items() if item.rank == rank): rank for rank in ranks},
        alpha_pattern={_any_of(n for n, item in layers.items() if item.alpha == alpha): alpha for alpha in alphas},
    )
    inject_adapter_in_model(config, parts, adapter)
    for name, low_rank in layers.items():
        layer: Any = parts.get_submodule(name)
        layer.lora_A[adapter].weight.data.copy_(low_rank.down)
        layer.lora_B[adapter].weight.data.copy_(low_rank.up)


def _any_of(names: Iterable[str]) -> str:
    return "|".join(name.replace(".", r"\.") for name in names)


def _parametrize(module: nn.Module, layers: Mapping[Layer, LowRank], adapter: str) -> None:
    """Changes a fused weight by the updates of its parts; of a part without one, by nothing."""
    weight_name = next(iter(layers)).weight
    assert weight_name is not None
    weight: Tensor = getattr(module, weight_name)
    parts = 3 if weight_name == "in_proj_weight" else 1
    rank = max(low_rank.rank for low_rank in layers.values())
    down = weight.new_zeros(parts, rank, weight.shape[1])
    up = weight.new_zeros(parts, len(weight) // parts, rank)
    alphas = {low_rank.alpha / low_rank.rank for low_rank in layers.values()}
    factor = alphas.pop() if len(alphas) == 1 else 1.0
    for layer, low_rank in layers.items():
        down[layer.part, : low_rank.rank] = low_rank.down
        up[layer.part, :, : low_rank.rank] = low_rank.up * (low_rank.alpha / low_rank.rank / factor)
    added = LowRankWeight(down, up, adapter=adapter, alpha=factor * rank)
    parametrize.register_parametrization(module, weight_name, added)


def _matched(file: Mapping[str, LowRank], parts: Parts, path: Path | str) -> dict[Layer, LowRank]:
    """The model's layers that a file's layers are for."""
    known = {name: layer for layer in parts.layers() for name in layer.names}
    matched = {}
    for name, low_rank in file.items():
        if name not in known:
            encoders = len(text_encoders(parts.conditioner))
            raise ValueError(
                f"got {path} with a layer {name}, which this model, a U-Net and {encoders} CLIP text encoders, does "
                "not have; use a LoRA that was made for this family of models"
            )
        matched[known[name]] = _fitted(low_rank, weight_shape(parts, known[name]), name, path)
    return matched


def _fitted(low_rank: LowRank, shape: tuple[int, ...], name: str, path: Path | str) -> LowRank:
    """The update with the dimensions of its weight: a 1 x 1 convolution is a linear layer in some files."""
    down, up = low_rank.down, low_rank.up
    plain = down.flatten(1) if down.shape[2:] == (1, 1) else down
    if (len(up), *plain.shape[1:]) != (shape[:2] if shape[2:] == (1, 1) else shape):
        raise ValueError(
            f"got {path} with a layer {name} for a weight of shape {low_rank.shape}, expected {shape}; use a LoRA that "
            "was made for this family of models"
        )
    ones = [1] * (len(shape) - 2)
    return LowRank(plain.reshape(len(down), *shape[1:]), up.reshape(len(up), -1, *ones), low_rank.alpha)


def weight_shape(parts: Parts, layer: Layer) -> tuple[int, ...]:
    weight: Tensor = getattr(parts.get_submodule(layer.module), layer.weight or "weight")
    rows = len(weight) // 3 if layer.weight == "in_proj_weight" else len(weight)
    return (rows, *weight.shape[1:])


def _adapted(parts: Parts, adapter: str) -> Iterator[tuple[Layer, LowRank]]:
    """The layers that a LoRA changes, and how."""
    for layer in parts.layers():
        module: Any = parts.get_submodule(layer.module)
        if layer.weight and parametrize.is_parametrized(module, layer.weight):
            for added in module.parametrizations[layer.weight]:
                if added.adapter == adapter:
                    yield layer, LowRank(added.down[layer.part], added.up[layer.part], added.alpha)
        elif not layer.weight and adapter in getattr(module, "lora_A", ()):
            down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            yield layer, LowRank(down, up, module.lora_alpha[adapter])


def _kohya(layer: Layer, parts: Parts) -> str:
    """The name that sd-scripts gives a layer: for SDXL after CompVis's names, before it after those of diffusers."""
    is_sdxl = parts.network.arguments["vector_dim"] is not None
    name = layer.names[-1] if is_sdxl else layer.names[0]
    return name if is_sdxl else name.replace("lora_te1_", "lora_te_", 1)


def _changed(parts: Parts) -> list[Any]:
    """Everything of a LoRA in the model: peft's layers and our parametrizations."""
    return [*_peft_layers(parts), *(layer for _, layer in _parametrized(parts))]


def _peft_layers(parts: Parts) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in parts.modules() if isinstance(module, LoraLayer)]


def _parametrized(parts: Parts) -> list[tuple[Tensor, LowRankWeight]]:
    """The parametrizations and the weights that they change."""
    lists = [module for module in parts.modules() if isinstance(module, parametrize.ParametrizationList)]
    return [(found.original, item) for found in lists for item in found if isinstance(item, LowRankWeight)]


def _check_name(adapter: str, denoiser: Denoiser, conditioner: Conditioner) -> None:
    names = adapters(denoiser, conditioner)
    if adapter not in names:
        raise ValueError(f"got LoRA {adapter}, expected one of {', '.join(names) or 'none: there is no LoRA here'}")
