"""Where each part of an autoencoder stands here and in diffusers, and its geometry, read from names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

ATTENTION_LINEAR = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# Attention is placed by sizes in pixels, which weights do not tell: any image size that all levels divide will do, and
# this is that of the published autoencoders.
RESOLUTION = 256


def autoencoder_geometry(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments that names and shapes tell, from CompVis names without prefix.

    They are those of `VQAutoencoder` when `num_codes` is among them, otherwise of `KLAutoencoder`. The tensors may be
    on the meta device. Shapes cannot tell norm_groups, dropout and the latent scale.

    Raises:
        ValueError: tensors that no autoencoder of this family has.
    """
    base_channels, image_channels = _shape(state, "encoder.conv_in.weight")[:2]
    levels = _count(state, "encoder.down.{}.block.0.norm1.weight")
    widths = [_shape(state, f"encoder.down.{level}.block.0.conv2.weight")[0] for level in range(levels)]
    blocks = {_count(state, f"encoder.down.{level}.block.{{}}.norm1.weight") for level in range(levels)}
    if len(blocks) != 1 or any(width % base_channels for width in widths):
        raise ValueError(
            f"got levels of {widths} channels and {sorted(blocks)} blocks after a first convolution to "
            f"{base_channels}, expected multiples of it and the same number of blocks; these are not the weights of a "
            "published kind"
        )
    attends = [f"encoder.down.{level}.attn.0.norm.weight" in state for level in range(levels)]
    return {
        "image_channels": image_channels,
        "latent_channels": _latent_channels(state),
        "base_channels": base_channels,
        "channel_mult": [width // base_channels for width in widths],
        "num_res_blocks": blocks.pop(),
        "attention_type": "vanilla" if "encoder.mid.attn_1.norm.weight" in state else "none",
        **attention_arguments(attends),
        **({"num_codes": state["quantize.embedding.weight"].shape[0]} if "quantize.embedding.weight" in state else {}),
    }


def attention_arguments(attends: Sequence[bool]) -> dict[str, Any]:
    """attn_resolutions and resolution that let these levels attend."""
    if not any(attends):
        return {"attn_resolutions": [], "resolution": None}
    resolution = max(RESOLUTION, 2 ** (len(attends) - 1))
    return {
        "attn_resolutions": [resolution // 2**level for level, yes in enumerate(attends) if yes],
        "resolution": resolution,
    }


def attending_levels(arguments: Mapping[str, Any]) -> list[bool]:
    """For each level, whether it attends, the full resolution first."""
    resolution, places = arguments.get("resolution"), arguments.get("attn_resolutions", ())
    levels = range(len(arguments["channel_mult"]))
    return [resolution is not None and resolution // 2**level in places for level in levels]


def module_names(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Names of modules here, and in diffusers; a name stands for all that lies under it, the longest one first.

    diffusers counts the decoder's levels from the lowest resolution.
    """
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv", "quantize": "quantize"}
    for half in ("encoder", "decoder"):
        names |= {f"{half}.{end}": f"{half}.{end}" for end in ("conv_in", "conv_out")}
        names |= {f"{half}.norm_out": f"{half}.conv_norm_out"}
        for ours, theirs in _parts(arguments, half):
            names |= {
                f"{half}.{ours}": f"{half}.{theirs}",
                f"{half}.{ours}.nin_shortcut": f"{half}.{theirs}.conv_shortcut",
            }
    for ours, theirs in attentions(arguments):
        names |= {f"{ours}.norm": f"{theirs}.group_norm"}
        names |= {f"{ours}.{layer}": f"{theirs}.{linear}" for layer, linear in ATTENTION_LINEAR.items()}
    return names


def attentions(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every attention over pixels: its name here, and in diffusers."""
    depth = arguments["num_res_blocks"]
    attends = attending_levels(arguments)
    for half, ours, theirs, count in (
        ("encoder", "down", "down_blocks", depth),
        ("decoder", "up", "up_blocks", depth + 1),
    ):
        if arguments.get("attention_type", "vanilla") != "none":
            yield f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0"
        for level, yes in enumerate(attends):
            place = level if half == "encoder" else len(attends) - 1 - level
            for index in range(count if yes else 0):
                yield f"{half}.{ours}.{level}.attn.{index}", f"{half}.{theirs}.{place}.attentions.{index}"


def _parts(arguments: Mapping[str, Any], half: str) -> Iterator[tuple[str, str]]:
    """The residual blocks and resampling of one half: their names within it, here and in diffusers."""
    levels = len(arguments["channel_mult"])
    yield "mid.block_1", "mid_block.resnets.0"
    yield "mid.block_2", "mid_block.resnets.1"
    for level in range(levels):
        if half == "encoder":
            ours, theirs, count, resample = f"down.{level}", f"down_blocks.{level}", 0, "downsample"
        else:
            ours, theirs, count, resample = f"up.{level}", f"up_blocks.{levels - 1 - level}", 1, "upsample"
        for index in range(arguments["num_res_blocks"] + count):
            yield f"{ours}.block.{index}", f"{theirs}.resnets.{index}"
        yield f"{ours}.{resample}", f"{theirs}.{resample}rs.0"


def _latent_channels(state: Mapping[str, Tensor]) -> int:
    latent_channels, embedded = _shape(state, "post_quant_conv.weight")[:2]
    if latent_channels != embedded:
        raise ValueError(
            f"got latents of {embedded} channels for a decoder of {latent_channels}, expected the same number "
            "(embed_dim equal to z_channels); ldm has no such autoencoder"
        )
    return latent_channels


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    count = 0
    while pattern.format(count) in state:
        count += 1
    return count


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in state:
        raise ValueError(
            f"got {len(state)} tensors without {name}, expected an autoencoder's under CompVis names without a prefix; "
            "strip the prefix, or name an autoencoder's weights"
        )
    return tuple(state[name].shape)
