"""The config of a diffusers U-Net for constructor arguments of `UNet`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.interop.unet_geometry import one_if_equal
from ldm.interop.unet_keys import UNetPlan


def diffusers_config(
    arguments: Mapping[str, Any], *, sample_size: int | None, size_embed_dim: int | None
) -> tuple[str, dict[str, Any]]:
    """The class of diffusers that holds such a network, and its config; for the rest see `unet_to_diffusers`.

    Raises:
        ValueError: a network that no class of diffusers can compute.
    """
    plan = UNetPlan.of(arguments)
    if arguments["channel_mult"][0] != 1:
        raise _refusal(
            f"channel_mult {list(arguments['channel_mult'])}",
            "one that begins with 1: the first convolution is as wide",
        )
    if plan.context_dim is None:
        name, own = "UNet2DModel", _pixel_config(arguments, plan)
        if size_embed_dim is not None:
            raise _refusal("size_embed_dim for a network without context", "none")
    else:
        name, own = "UNet2DConditionModel", _conditional_config(arguments, plan, size_embed_dim)
    return name, {**_shared_config(arguments, plan), **own, "sample_size": sample_size}


def _refusal(got: str, expected: str) -> ValueError:
    return ValueError(
        f"got {got}, expected {expected} in diffusers; write a CompVis file instead, which holds any U-Net"
    )


def _shared_config(arguments: Mapping[str, Any], plan: UNetPlan) -> dict[str, Any]:
    return {
        "in_channels": arguments["in_channels"],
        "out_channels": arguments["out_channels"],
        "block_out_channels": plan.widths,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "act_fn": "silu",
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "dropout": arguments.get("dropout", 0.0),
        "norm_num_groups": arguments.get("norm_groups", 32),
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if arguments.get("use_scale_shift_norm") else "default",
        "num_class_embeds": arguments.get("num_classes"),
        **_block_types(plan),
    }


def _block_types(plan: UNetPlan) -> dict[str, list[str]]:
    prefix = "Attn" if plan.context_dim is None else "CrossAttn"
    plain = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if plan.resblock_updown else ("DownBlock2D", "UpBlock2D")
    )
    attending = (f"{prefix}DownBlock2D", f"{prefix}UpBlock2D")
    pairs = [attending if yes else plain for yes in plan.attends]
    return {"down_block_types": [down for down, _ in pairs], "up_block_types": [up for _, up in reversed(pairs)]}


def _conditional_config(arguments: Mapping[str, Any], plan: UNetPlan, size_embed_dim: int | None) -> dict[str, Any]:
    if plan.resblock_updown and len(plan.widths) > 1 and any(plan.attends):
        raise _refusal("resblock_updown on levels that attend to a context", "strided convolutions")
    return {
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "layers_per_block": one_if_equal(plan.num_res_blocks),
        "cross_attention_dim": plan.context_dim,
        "attention_head_dim": _numbers_of_heads(plan),
        "transformer_layers_per_block": one_if_equal(plan.depths),
        "use_linear_projection": arguments.get("use_linear_projection", False),
        "only_cross_attention": plan.without_self if any(plan.without_self) else False,
        **_vector_config(arguments.get("vector_dim"), size_embed_dim),
    }


def _numbers_of_heads(plan: UNetPlan) -> int | list[int]:
    """The field of diffusers is called attention_head_dim, but holds the number of heads (diffusers issue 2011)."""
    if plan.num_heads is not None:
        return plan.num_heads
    # A level that does not attend may be narrower than one head; diffusers reads its entry but builds nothing of it.
    return [max(1, plan.heads(width)) for width in plan.widths]


def _vector_config(vector_dim: int | None, size_embed_dim: int | None) -> dict[str, Any]:
    if size_embed_dim is None:
        kind = None if vector_dim is None else "projection"
        return {"class_embed_type": kind, "projection_class_embeddings_input_dim": vector_dim}
    if vector_dim is None:
        raise _refusal(f"size_embed_dim {size_embed_dim} for a network without vector_dim", "none")
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": size_embed_dim,
        "projection_class_embeddings_input_dim": vector_dim,
    }


def _pixel_config(arguments: Mapping[str, Any], plan: UNetPlan) -> dict[str, Any]:
    if len(set(plan.num_res_blocks)) > 1:
        raise _refusal(f"num_res_blocks {plan.num_res_blocks} without a context", "the same number on every level")
    if arguments.get("vector_dim") is not None:
        raise _refusal(f"vector_dim {arguments['vector_dim']} without a context", "num_classes or nothing")
    resampling = "resnet" if plan.resblock_updown else "conv"
    return {
        "mid_block_type": "UNetMidBlock2D",
        "layers_per_block": plan.num_res_blocks[0],
        "attention_head_dim": _head_width(plan),
        "attn_norm_num_groups": arguments.get("norm_groups", 32),
        "downsample_type": resampling,
        "upsample_type": resampling,
        "add_attention": True,
    }


def _head_width(plan: UNetPlan) -> int | None:
    """The width of every head, or None for one head of full width on every level."""
    attending: Sequence[int] = [width for width, yes in zip(plan.widths, plan.attends, strict=True) if yes]
    widths = {width // plan.heads(width) for width in [*attending, plan.widths[-1]]}
    if len(widths) == 1:
        return widths.pop()
    if plan.num_heads == 1:
        return None
    raise _refusal(
        f"{plan.num_heads} heads of {sorted(widths)} channels by level without a context",
        "heads of one width (num_head_channels)",
    )
