"""U-Nets between diffusers and here: names by a walk over the geometry, settings by config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.interop.diffusers_config import refusal
from ldm.interop.pixel_attention import join_qkv, present_name, split_qkv
from ldm.interop.unet_config_reading import unet_arguments
from ldm.interop.unet_config_writing import diffusers_config
from ldm.interop.unet_geometry import unet_geometry
from ldm.interop.unet_keys import module_names, pixel_attentions, renamed
from ldm.networks import UNet

__all__ = ["unet_from_diffusers", "unet_geometry", "unet_to_diffusers"]


def unet_to_diffusers(
    unet: UNet, *, sample_size: int | None = None, size_embed_dim: int | None = None
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The class of diffusers that computes what the network does, its config, and the weights under its names.

    The class is UNet2DConditionModel for a network with a context, UNet2DModel for one that attends over pixels, whose
    qkv rows are brought into order. Weights are views of the network's where they can be.

    Args:
        unet: any `UNet`; it may be on the meta device.
        sample_size: latent pixels along an edge that pipelines make by default, a field of the config.
        size_embed_dim: width of each embedded number (sizes, crops, a score) at the end of the vector condition; given,
            the vector is what the pipelines of Stable Diffusion XL put together ("text_time"), otherwise it is taken as
            it is ("projection").

    Raises:
        ValueError: a network that no class of diffusers can compute, with the argument that it comes from.
    """
    name, config = diffusers_config(unet.arguments, sample_size=sample_size, size_embed_dim=size_embed_dim)
    vector_place = "class_embedding" if size_embed_dim is None else "add_embedding"
    return name, config, state_to_diffusers(unet.state_dict(), unet.arguments, vector_place=vector_place)


def unet_from_diffusers(
    config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor arguments and weights of the `UNet` that computes what a diffusers U-Net does.

    The weights may be on the meta device and may have the names of older versions of diffusers. Those that the network
    has no place for keep their names, for strict loading to report. `upcast_attention` and `sample_size` are not taken
    over: they change no weight, and no result in float32. Attention over pixels gets the order of latent-diffusion
    (`new_attention_order` False).

    Args:
        config: what config.json holds.
        state: tensors by name, as in diffusion_pytorch_model.safetensors.

    Raises:
        ValueError: another class, or a setting that our network cannot compute, by name.
    """
    arguments = unet_arguments(config)
    added = config.get("addition_embed_type") == "text_time"
    ours = state_from_diffusers(state, arguments, vector_place="add_embedding" if added else "class_embedding")
    if not config.get("flip_sin_to_cos", True):
        if added:
            raise refusal(config, "flip_sin_to_cos", "True where sizes are embedded too")
        ours |= {name: _halves_swapped(ours[name]) for name in ["time_embed.0.weight"] if name in ours}
    return arguments, ours


def state_to_diffusers(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any], *, vector_place: str = "class_embedding"
) -> dict[str, Tensor]:
    """Weights of a `UNet` with such arguments under the names of diffusers; for `vector_place` see `module_names`."""
    names, attentions = module_names(arguments, vector_place=vector_place), pixel_attentions(arguments)
    new_order = arguments.get("new_attention_order", False)
    theirs: dict[str, Tensor] = {}
    for name, value in state.items():
        place, _, leaf = name.rpartition(".")
        attention, _, layer = place.rpartition(".")
        if attention in attentions and layer == "qkv":
            target, heads = attentions[attention]
            parts = split_qkv(value, num_heads=heads, new_order=new_order)
            theirs |= {f"{target}.to_{part}.{leaf}": one for part, one in zip("qkv", parts, strict=True)}
        else:
            one_dimensional = attention in attentions and layer == "proj_out" and leaf == "weight"
            theirs[renamed(name, names) or name] = value.squeeze(-1) if one_dimensional else value
    return theirs


def state_from_diffusers(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any], *, vector_place: str = "class_embedding"
) -> dict[str, Tensor]:
    """Weights under the names of diffusers as those of a `UNet` with such arguments."""
    ours_of = {theirs: ours for ours, theirs in module_names(arguments, vector_place=vector_place).items()}
    given = {present_name(name): value for name, value in state.items()}
    ours: dict[str, Tensor] = {}
    for place, (theirs, heads) in pixel_attentions(arguments).items():
        for leaf in ("weight", "bias"):
            parts = [f"{theirs}.to_{part}.{leaf}" for part in "qkv"]
            if all(part in given for part in parts):
                q, k, v = (_flat(given.pop(part)) for part in parts)
                ours[f"{place}.qkv.{leaf}"] = join_qkv(q, k, v, num_heads=heads)
        if (name := f"{theirs}.to_out.0.weight") in given:
            given[name] = _flat(given[name]).unsqueeze(-1)
    return ours | {renamed(name, ours_of) or name: value for name, value in given.items()}


def _flat(weight: Tensor) -> Tensor:
    """A linear layer's weight (C, C), which some old files hold as a convolution's; a bias as it is."""
    return weight.flatten(1) if weight.ndim > 1 else weight


def _halves_swapped(weight: Tensor) -> Tensor:
    """Columns (D, 2n) for sines first as columns for cosines first."""
    return torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)
