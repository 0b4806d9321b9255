"""Constructor arguments of `UNet` from the config of a diffusers U-Net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ldm.interop.diffusers_config import block_kinds, choice, class_name, refusal
from ldm.interop.unet_geometry import one_if_equal
from ldm.networks.unet_blocks import per_level

# What a setting may hold for our network to compute the same; where a config is silent, the first.
FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
    "downsample_padding": (1,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "norm_eps": (1e-5,),
    "time_embedding_type": ("positional",),
}
CONDITIONAL_FIXED: dict[str, tuple[Any, ...]] = {
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
}
PIXEL_FIXED: dict[str, tuple[Any, ...]] = {
    "add_attention": (True,),
    "class_embed_type": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
}


class _Kind(NamedTuple):
    """What a block's type says: whether it attends, and whether it resamples in residual blocks."""

    attends: bool
    resamples_in_blocks: bool


def conditional_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the config of a UNet2DConditionModel.

    Raises:
        ValueError: a setting that our network cannot compute, by name.
    """
    for field, allowed in (FIXED | CONDITIONAL_FIXED).items():
        choice(config, field, *allowed)
    kinds = {
        "CrossAttnDownBlock2D": _Kind(True, False),
        "DownBlock2D": _Kind(False, False),
        "ResnetDownsampleBlock2D": _Kind(False, True),
    }
    defaults = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    shared = _shared_arguments(config, kinds, defaults, widths=(320, 640, 1280, 1280), channels=4)
    levels = len(shared["channel_mult"])
    attends = [2**level in shared["attention_resolutions"] for level in range(levels)]
    return {
        **shared,
        **_conditional_heads(config, shared, attends),
        "context_dim": _context_dim(config),
        "transformer_depth": _depths(config, attends),
        "use_linear_projection": bool(config.get("use_linear_projection", False)),
        "disable_self_attention": _without_self(config, attends),
        **_label_arguments(config),
    }


def pixel_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the config of a UNet2DModel.

    Raises:
        ValueError: a setting that our network cannot compute, by name.
    """
    for field, allowed in (FIXED | PIXEL_FIXED).items():
        choice(config, field, *allowed)
    in_blocks = choice(config, "downsample_type", "conv", "resnet") == "resnet"
    choice(config, "upsample_type", "resnet" if in_blocks else "conv")
    kinds = {
        "AttnDownBlock2D": _Kind(True, in_blocks),
        "DownBlock2D": _Kind(False, False),
        "ResnetDownsampleBlock2D": _Kind(False, True),
    }
    defaults = ["DownBlock2D"] + ["AttnDownBlock2D"] * 3
    shared = _shared_arguments(config, kinds, defaults, widths=(224, 448, 672, 896), channels=3)
    # Without a number, scale-shift networks have no norm in the middle's attention at all.
    implied = shared["norm_groups"] if not shared["use_scale_shift_norm"] else None
    if (config.get("attn_norm_num_groups") or implied) != shared["norm_groups"]:
        raise refusal(config, "attn_norm_num_groups", f"{shared['norm_groups']}, as in norm_num_groups")
    head_width = config.get("attention_head_dim", 8)
    heads = {"num_heads": 1} if head_width is None else {"num_head_channels": head_width}
    return {**shared, **heads, "num_classes": config.get("num_class_embeds")}


def _shared_arguments(
    config: Mapping[str, Any],
    kinds: Mapping[str, _Kind],
    defaults: Sequence[str],
    *,
    widths: Sequence[int],
    channels: int,
) -> dict[str, Any]:
    """What both classes say in the same words."""
    widths = list(config.get("block_out_channels", widths))
    down, up = block_kinds(config, kinds, defaults)
    if not len(down) == len(up) == len(widths):
        raise refusal(config, "down_block_types", f"{len(widths)} of them, one for each of block_out_channels")
    attends = [kind.attends for kind in down]
    if attends != [kind.attends for kind in up]:
        raise refusal(config, "up_block_types", "attention on the same levels as down_block_types")
    if any(width % widths[0] for width in widths):
        raise refusal(config, "block_out_channels", f"multiples of the first, {widths[0]}")
    if config.get("time_embedding_dim") not in (None, 4 * widths[0]):
        raise refusal(config, "time_embedding_dim", f"four times the first width, {4 * widths[0]}")
    if not isinstance(config.get("norm_num_groups", 32), int):
        raise refusal(config, "norm_num_groups", "a number")
    return {
        "in_channels": config.get("in_channels", channels),
        "out_channels": config.get("out_channels", channels),
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": _one_or_list(config.get("layers_per_block", 2)),
        "attention_resolutions": [2**level for level, yes in enumerate(attends) if yes],
        "use_scale_shift_norm": choice(config, "resnet_time_scale_shift", "default", "scale_shift") != "default",
        "resblock_updown": _resamples_in_blocks(config, down, up),
        "dropout": float(config.get("dropout", 0.0)),
        "norm_groups": config.get("norm_num_groups", 32),
    }


def _resamples_in_blocks(config: Mapping[str, Any], down: Sequence[_Kind], up: Sequence[_Kind]) -> bool:
    """Whether every level resamples in residual blocks; there is no way down from the last or up from the first."""
    found = {kind.resamples_in_blocks for kind in [*down[:-1], *up[1:]]}
    if len(found) > 1:
        raise refusal(config, "down_block_types", "that all levels, down and up, resample by residual blocks, or none")
    return found == {True}


def _conditional_heads(config: Mapping[str, Any], shared: Mapping[str, Any], attends: Sequence[bool]) -> dict[str, Any]:
    """Heads by number or by width; `attention_head_dim` holds the *number* of heads, for the sake of old configs."""
    field = "attention_head_dim" if config.get("num_attention_heads") is None else "num_attention_heads"
    given = config.get(field, 8)
    mult = shared["channel_mult"]
    heads = per_level(field, given, len(mult))
    # The middle, as wide as the last level, always attends.
    used = [level for level, yes in enumerate(attends) if yes or level == len(mult) - 1]
    numbers = {heads[level] for level in used}
    head_widths = {shared["model_channels"] * mult[level] / heads[level] for level in used}
    # A list of numbers that follows the widths is how heads of one width are written down.
    if len(head_widths) == 1 and (not isinstance(given, int) or len(numbers) > 1):
        return {"num_head_channels": int(head_widths.pop())}
    if len(numbers) == 1:
        return {"num_heads": numbers.pop()}
    raise refusal(config, field, "the same number of heads, or heads of the same width, on every level")


def _context_dim(config: Mapping[str, Any]) -> int:
    given = config.get("cross_attention_dim", 1280)
    dims = {given} if isinstance(given, int) else set(given or [None])
    if len(dims) > 1 or None in dims:
        raise refusal(config, "cross_attention_dim", "one width for all levels")
    return int(dims.pop())


def _depths(config: Mapping[str, Any], attends: Sequence[bool]) -> int | list[int]:
    given = config.get("transformer_layers_per_block", 1)
    if isinstance(given, int):
        return given
    if any(not isinstance(depth, int) for depth in given):
        raise refusal(config, "transformer_layers_per_block", "one depth a level")
    # The last one is the middle's too; the others matter only where a level attends.
    unused = [not yes for yes in attends[:-1]] + [False]
    return _one_or_list([1 if skip else depth for depth, skip in zip(given, unused, strict=True)])


def _without_self(config: Mapping[str, Any], attends: Sequence[bool]) -> list[bool] | None:
    given = config.get("only_cross_attention", False)
    by_level = per_level("only_cross_attention", given, len(attends))
    found = [yes and attending for yes, attending in zip(by_level, attends, strict=True)]
    return found if any(found) else None


def _label_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    kind = choice(config, "class_embed_type", None, "projection")
    added = config.get("addition_embed_type") == "text_time"
    num_classes = config.get("num_class_embeds") if kind is None else None
    if added and (kind is not None or num_classes is not None):
        raise refusal(config, "addition_embed_type", "None beside an embedding of classes")
    width = config.get("projection_class_embeddings_input_dim")
    projects = added or kind == "projection"
    if projects and width is None:
        raise refusal(config, "projection_class_embeddings_input_dim", "the width of the vector condition")
    return {"num_classes": num_classes, "vector_dim": width if projects else None}


def _one_or_list(value: int | Sequence[int]) -> int | list[int]:
    return value if isinstance(value, int) else one_if_equal(value)


def unet_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of `UNet` for the config of a diffusers U-Net.

    Raises:
        ValueError: another class, or a setting that our network cannot compute, by name.
    """
    name = class_name(config, ["UNet2DConditionModel", "UNet2DModel"])
    return conditional_arguments(config) if name == "UNet2DConditionModel" else pixel_arguments(config)
