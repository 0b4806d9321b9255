"""Settings of autoencoders: constructor arguments here, a config in diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.interop.autoencoder_keys import attending_levels, attention_arguments
from ldm.interop.diffusers_config import block_kinds, choice, class_name, refusal

CLASSES = ("AutoencoderKL", "VQModel")
KINDS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
# The scale before it had a field: the pipelines of that time had the number of Stable Diffusion in their code for
# AutoencoderKL, and none at all for VQModel.
FORMER_SCALE = {"AutoencoderKL": 0.18215, "VQModel": 1.0}


def autoencoder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments for a diffusers config; `num_codes` is among them for a VQModel.

    Raises:
        ValueError: another class, or a setting that our autoencoders cannot compute, by name.
    """
    name = class_name(config, CLASSES)
    choice(config, "act_fn", "silu", "swish")
    widths = list(config.get("block_out_channels", [64]))
    latent_channels = config.get("latent_channels", 4 if name == "AutoencoderKL" else 3)
    own = _kl_arguments(config) if name == "AutoencoderKL" else _vq_arguments(config, latent_channels)
    image_channels = config.get("in_channels", 3)
    if config.get("out_channels", 3) != image_channels:
        raise refusal(config, "out_channels", f"as many as in_channels, {image_channels}")
    if any(width % widths[0] for width in widths):
        raise refusal(config, "block_out_channels", f"multiples of the first, {widths[0]}")
    down, up = block_kinds(config, KINDS, ["DownEncoderBlock2D"])
    if not len(down) == len(widths):
        raise refusal(config, "down_block_types", f"{len(widths)} of them, one for each of block_out_channels")
    if down != up:
        raise refusal(config, "up_block_types", "attention on the same levels as down_block_types")
    return {
        "image_channels": image_channels,
        "latent_channels": latent_channels,
        "base_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config.get("layers_per_block", 1),
        **attention_arguments(down),
        "attention_type": "vanilla" if config.get("mid_block_add_attention", True) else "none",
        "norm_groups": config.get("norm_num_groups", 32),
        "latent_scale": config.get("scaling_factor", FORMER_SCALE[name]),
        **own,
    }


def _kl_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    for field in ("latents_mean", "latents_std"):
        choice(config, field, None)
    return {"latent_shift": config.get("shift_factor") or 0.0}


def _vq_arguments(config: Mapping[str, Any], latent_channels: int) -> dict[str, Any]:
    choice(config, "norm_type", "group")
    choice(config, "lookup_from_codebook", False)
    if (config.get("vq_embed_dim") or latent_channels) != latent_channels:
        raise refusal(config, "vq_embed_dim", f"as many as latent_channels, {latent_channels}")
    return {"num_codes": config.get("num_vq_embeddings", 256)}


def diffusers_config(
    arguments: Mapping[str, Any], *, latent_scale: float, latent_shift: float, sample_size: int | None
) -> tuple[str, dict[str, Any]]:
    """The class of diffusers that holds such an autoencoder, and its config.

    Raises:
        ValueError: an autoencoder that no class of diffusers can hold.
    """
    if arguments["channel_mult"][0] != 1:
        raise ValueError(
            f"got channel_mult {list(arguments['channel_mult'])}, expected one that begins with 1 in diffusers, where "
            "the first convolution is as wide as the first level; write a CompVis file instead"
        )
    config = {
        "in_channels": arguments["image_channels"],
        "out_channels": arguments["image_channels"],
        **_block_types(attending_levels(arguments)),
        "block_out_channels": [arguments["base_channels"] * factor for factor in arguments["channel_mult"]],
        "layers_per_block": arguments["num_res_blocks"],
        "act_fn": "silu",
        "latent_channels": arguments["latent_channels"],
        "norm_num_groups": arguments["norm_groups"],
        "mid_block_add_attention": arguments["attention_type"] != "none",
        "scaling_factor": latent_scale,
    }
    if sample_size is not None:
        config["sample_size"] = sample_size
    if "num_codes" not in arguments:
        return "AutoencoderKL", {**config, "shift_factor": latent_shift or None}
    if latent_shift:
        raise ValueError(
            f"got a VQAutoencoder with latent_shift {latent_shift}, expected 0 in diffusers, whose VQModel has only a "
            "scale; write a CompVis file instead"
        )
    codebook = {"num_vq_embeddings": arguments["num_codes"], "vq_embed_dim": arguments["latent_channels"]}
    return "VQModel", {**config, **codebook, "norm_type": "group", "lookup_from_codebook": False}


def _block_types(attends: list[bool]) -> dict[str, list[str]]:
    prefixes = ["Attn" if yes else "" for yes in attends]
    return {
        "down_block_types": [f"{prefix}DownEncoderBlock2D" for prefix in prefixes],
        "up_block_types": [f"{prefix}UpDecoderBlock2D" for prefix in reversed(prefixes)],
    }
