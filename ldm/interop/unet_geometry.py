"""The geometry of a U-Net, read from the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

ValueT = TypeVar("ValueT")


def unet_geometry(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of `UNet` that names and shapes tell, from CompVis names without prefix.

    The tensors may be on the meta device. Shapes cannot tell num_heads, num_head_channels, new_attention_order,
    dropout and norm_groups, nor a first attention to the context where the context is as wide as the level
    (self-attention is then taken). Depths of levels that do not attend are 1.

    Raises:
        ValueError: tensors that no U-Net of this family has.
    """
    levels = _levels(state)
    width, stem = _shape(state, "time_embed.0.weight")[1], _shape(state, "input_blocks.0.0.weight")[0]
    if any(level.width % width for level in levels):
        raise ValueError(
            f"got levels of {[level.width for level in levels]} channels with a time embedding of {width}, "
            "expected multiples of it; these are not the weights of a U-Net of latent diffusion"
        )
    return {
        "in_channels": _shape(state, "input_blocks.0.0.weight")[1],
        "out_channels": _shape(state, "out.2.weight")[0],
        "model_channels": width,
        "stem_channels": None if stem == width else stem,
        "channel_mult": [level.width // width for level in levels],
        "num_res_blocks": one_if_equal([level.num_blocks - 1 for level in levels]),
        "attention_resolutions": [2**index for index, level in enumerate(levels) if level.attends],
        **_transformer_arguments(state, levels),
        "use_scale_shift_norm": _scales_and_shifts(state),
        "resblock_updown": any(re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", name) for name in state),
        "num_classes": state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None,
        "vector_dim": state["label_emb.0.0.weight"].shape[1] if "label_emb.0.0.weight" in state else None,
    }


@dataclass
class _Level:
    """What the way up shows of one resolution."""

    width: int
    first_block: str
    num_blocks: int = 0
    attends: bool = False


def one_if_equal(values: Sequence[ValueT]) -> ValueT | list[ValueT]:
    """The one value that all have, or else the list of them."""
    return values[0] if len(set(values)) == 1 else list(values)


def _levels(state: Mapping[str, Tensor]) -> list[_Level]:
    """The levels, the full resolution first.

    The way up tells where a level ends: its last block also upsamples. On the way down a residual block that
    downsamples looks like any other.
    """
    levels: list[_Level] = []
    index, ended = 0, True
    while f"output_blocks.{index}.0.in_layers.0.weight" in state:
        block = f"output_blocks.{index}"
        if ended:
            levels.append(_Level(_shape(state, f"{block}.0.out_layers.3.weight")[0], block))
        levels[-1].num_blocks += 1
        levels[-1].attends = f"{block}.1.norm.weight" in state
        place = 2 if levels[-1].attends else 1
        ended = any(f"{block}.{place}.{leaf}.weight" in state for leaf in ("conv", "in_layers.0"))
        index += 1
    if not levels:
        raise ValueError(
            f"got {len(state)} tensors without output_blocks.0.0.in_layers.0.weight, expected a U-Net's under CompVis "
            "names without a prefix; strip the prefix, or name a U-Net's weights"
        )
    return levels[::-1]


def _transformer_arguments(state: Mapping[str, Tensor], levels: Sequence[_Level]) -> dict[str, Any]:
    """Arguments about spatial transformers, from the middle's (it always attends) and each level's first one."""
    if "middle_block.1.qkv.weight" in state:
        return {
            "context_dim": None,
            "transformer_depth": 1,
            "use_linear_projection": False,
            "disable_self_attention": None,
        }
    context_dim = _shape(state, "middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1]
    middle_depth = _depth(state, "middle_block.1")
    depths = [_depth(state, f"{level.first_block}.1") if level.attends else 1 for level in levels]
    if levels[-1].attends and depths[-1] != middle_depth:
        raise ValueError(
            f"got transformers of depth {middle_depth} in the middle and {depths[-1]} on the last level, expected the "
            "same depth; this U-Net has a geometry that ldm's cannot take"
        )
    depths[-1] = middle_depth
    used = [depth for depth, level in zip(depths[:-1], levels[:-1], strict=True) if level.attends] + depths[-1:]
    without_self = [level.attends and _is_without_self(state, level, context_dim) for level in levels]
    return {
        "context_dim": context_dim,
        "transformer_depth": used[0] if len(set(used)) == 1 else depths,
        "use_linear_projection": len(_shape(state, "middle_block.1.proj_in.weight")) == 2,
        "disable_self_attention": without_self if any(without_self) else None,
    }


def _depth(state: Mapping[str, Tensor], place: str) -> int:
    depth = 0
    while f"{place}.transformer_blocks.{depth}.norm1.weight" in state:
        depth += 1
    return depth


def _is_without_self(state: Mapping[str, Tensor], level: _Level, context_dim: int) -> bool:
    width = _shape(state, f"{level.first_block}.1.transformer_blocks.0.attn1.to_k.weight")[1]
    return width == context_dim != level.width


def _scales_and_shifts(state: Mapping[str, Tensor]) -> bool:
    embedded = _shape(state, "middle_block.0.emb_layers.1.weight")[0]
    return embedded == 2 * _shape(state, "middle_block.0.out_layers.3.weight")[0]


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in state:
        raise ValueError(
            f"got {len(state)} tensors without {name}, expected a U-Net's under CompVis names without a prefix; "
            "strip the prefix, or name a U-Net's weights"
        )
    return tuple(state[name].shape)
