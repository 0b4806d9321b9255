"""Autoencoders between diffusers and here: names by a walk over the geometry, settings and scale by config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.autoencoders import Autoencoder, KLAutoencoder, VQAutoencoder
from ldm.interop.autoencoder_config import autoencoder_arguments, diffusers_config
from ldm.interop.autoencoder_keys import ATTENTION_LINEAR, attentions, autoencoder_geometry, module_names
from ldm.interop.pixel_attention import present_name
from ldm.interop.unet_keys import renamed

__all__ = ["autoencoder_class", "autoencoder_from_diffusers", "autoencoder_geometry", "autoencoder_to_diffusers"]

SCALE_BUFFERS = ("latent_scale", "latent_shift")


def autoencoder_class(arguments: Mapping[str, Any]) -> type[KLAutoencoder] | type[VQAutoencoder]:
    """The class that constructor arguments of `autoencoder_geometry` or `autoencoder_from_diffusers` belong to."""
    return VQAutoencoder if "num_codes" in arguments else KLAutoencoder


def autoencoder_to_diffusers(
    autoencoder: Autoencoder, *, sample_size: int | None = None
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The class of diffusers that computes what the autoencoder does, its config, and the weights under its names.

    The scale and shift of latents go into the config. Weights are views of the autoencoder's.

    Args:
        autoencoder: a `KLAutoencoder` or `VQAutoencoder`; it may be on the meta device.
        sample_size: pixels along an edge of the training images, a field of the config (tiling reads it).

    Raises:
        ValueError: an autoencoder that no class of diffusers can hold.
    """
    if not isinstance(autoencoder, KLAutoencoder | VQAutoencoder):
        raise ValueError(
            f"got a {type(autoencoder).__name__}, expected a KLAutoencoder or VQAutoencoder; "
            "diffusers has no class for another"
        )
    arguments = autoencoder.arguments
    scale, shift = (_scalar(getattr(autoencoder, name), arguments[name]) for name in SCALE_BUFFERS)
    name, config = diffusers_config(arguments, latent_scale=scale, latent_shift=shift, sample_size=sample_size)
    state = {name: value for name, value in autoencoder.state_dict().items() if name not in SCALE_BUFFERS}
    return name, config, state_to_diffusers(state, arguments)


def autoencoder_from_diffusers(
    config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor arguments and weights of the autoencoder that computes what an AutoencoderKL or VQModel does.

    `autoencoder_class` names our class. The weights may be on the meta device and may have the names of older versions
    of diffusers; the two buffers of the latent scale come with them. A missing quant_conv becomes the identity. Names
    that the autoencoder has no place for stay as they are, for strict loading to report.

    Raises:
        ValueError: another class, or a setting that our autoencoders cannot compute, by name.
    """
    arguments = autoencoder_arguments(config)
    ours = state_from_diffusers(state, arguments)
    if config["_class_name"] == "AutoencoderKL" and "decoder.conv_in.weight" in ours:
        like = ours["decoder.conv_in.weight"]
        channels = arguments["latent_channels"]
        if not config.get("use_quant_conv", True):
            ours |= _identity("quant_conv", 2 * channels, like)
        if not config.get("use_post_quant_conv", True):
            ours |= _identity("post_quant_conv", channels, like)
    ours |= {name: torch.tensor(float(arguments.get(name, 0.0))) for name in SCALE_BUFFERS}
    return arguments, ours


def state_to_diffusers(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of an autoencoder with such arguments, without its scale, under the names of diffusers."""
    names = module_names(arguments)
    convolutions = {f"{ours}.{layer}.weight" for ours, _ in attentions(arguments) for layer in ATTENTION_LINEAR}
    return {
        renamed(name, names) or name: value.flatten(1) if name in convolutions else value
        for name, value in state.items()
    }


def state_from_diffusers(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights under the names of diffusers as those of an autoencoder with such arguments, without its scale."""
    ours_of = {theirs: ours for ours, theirs in module_names(arguments).items()}
    linear = {f"{theirs}.{layer}.weight" for _, theirs in attentions(arguments) for layer in ATTENTION_LINEAR.values()}
    given = {present_name(name): value for name, value in state.items()}
    return {
        renamed(name, ours_of) or name: value.flatten(1)[:, :, None, None] if name in linear else value
        for name, value in given.items()
    }


def _identity(module: str, channels: int, like: Tensor) -> dict[str, Tensor]:
    """A 1x1 convolution that changes nothing."""
    weight = torch.eye(channels, dtype=like.dtype, device=like.device)[:, :, None, None]
    return {f"{module}.weight": weight, f"{module}.bias": weight.new_zeros(channels)}


def _scalar(buffer: Tensor, built_with: float) -> float:
    """The number that a float32 buffer was set to: of all that round to its value, the one with the fewest digits."""
    if buffer.is_meta:
        return built_with
    shortest = (float(f"{buffer.item():.{digits}g}") for digits in range(1, 10))
    return next(number for number in shortest if torch.tensor(number).equal(buffer.cpu().float()))
