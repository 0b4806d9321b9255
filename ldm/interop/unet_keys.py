"""Where each part of a U-Net stands here and in diffusers, found by walking the geometry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ldm.networks.unet_blocks import per_level

RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


@dataclass(frozen=True)
class Part:
    """One layer of the network: its name here and in diffusers, what it is, and the channels that it puts out."""

    ours: str
    theirs: str
    kind: Literal["residual", "attention", "down", "up"]
    channels: int


@dataclass(frozen=True, kw_only=True)
class UNetPlan:
    """The structure that constructor arguments of `UNet` stand for, level by level, the full resolution first."""

    widths: list[int]
    num_res_blocks: list[int]
    attends: list[bool]
    depths: list[int]
    without_self: list[bool]
    context_dim: int | None
    num_heads: int | None
    num_head_channels: int | None
    resblock_updown: bool

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> UNetPlan:
        """Reads constructor arguments; those with a default may be absent.

        Raises:
            ValueError: a list that does not have one entry a level.
        """
        mult = arguments["channel_mult"]
        levels = len(mult)
        return cls(
            widths=[arguments["model_channels"] * factor for factor in mult],
            num_res_blocks=per_level("num_res_blocks", arguments["num_res_blocks"], levels),
            attends=[2**level in arguments["attention_resolutions"] for level in range(levels)],
            depths=per_level("transformer_depth", arguments.get("transformer_depth", 1), levels),
            without_self=per_level("disable_self_attention", arguments.get("disable_self_attention") or False, levels),
            context_dim=arguments.get("context_dim"),
            num_heads=arguments.get("num_heads"),
            num_head_channels=arguments.get("num_head_channels"),
            resblock_updown=arguments.get("resblock_updown", False),
        )

    def heads(self, channels: int) -> int:
        """The number of attention heads at a width."""
        if self.num_heads is not None:
            return self.num_heads
        assert self.num_head_channels is not None
        return channels // self.num_head_channels

    def parts(self) -> Iterator[Part]:
        """Every layer between the first convolution and the last, in the order of the forward pass."""
        yield from self._down()
        yield from self._middle()
        yield from self._up()

    def _down(self) -> Iterator[Part]:
        index = 1
        for level, width in enumerate(self.widths):
            block = f"down_blocks.{level}"
            for position in range(self.num_res_blocks[level]):
                yield from self._layers(f"input_blocks.{index}", block, position, level)
                index += 1
            if level < len(self.widths) - 1:
                yield Part(f"input_blocks.{index}.0", f"{block}.downsamplers.0", "down", width)
                index += 1

    def _middle(self) -> Iterator[Part]:
        width = self.widths[-1]
        yield Part("middle_block.0", "mid_block.resnets.0", "residual", width)
        yield Part("middle_block.1", "mid_block.attentions.0", "attention", width)
        yield Part("middle_block.2", "mid_block.resnets.1", "residual", width)

    def _up(self) -> Iterator[Part]:
        index = 0
        for step, level in enumerate(reversed(range(len(self.widths)))):
            block = f"up_blocks.{step}"
            for position in range(self.num_res_blocks[level] + 1):
                yield from self._layers(f"output_blocks.{index}", block, position, level)
                index += 1
            if level > 0:
                # It shares its block with the level's last residual block and attention.
                place = 2 if self.attends[level] else 1
                yield Part(f"output_blocks.{index - 1}.{place}", f"{block}.upsamplers.0", "up", self.widths[level])

    def _layers(self, ours: str, theirs: str, position: int, level: int) -> Iterator[Part]:
        width = self.widths[level]
        yield Part(f"{ours}.0", f"{theirs}.resnets.{position}", "residual", width)
        if self.attends[level]:
            yield Part(f"{ours}.1", f"{theirs}.attentions.{position}", "attention", width)


def module_names(arguments: Mapping[str, Any], *, vector_place: str = "class_embedding") -> dict[str, str]:
    """Names of modules here, and in diffusers, for all whose tensors only change their name (and view).

    The qkv convolutions of attention over pixels are not among them. A name stands for all that lies under it.

    Args:
        arguments: constructor arguments of `UNet`.
        vector_place: diffusers' module for a real vector condition, "class_embedding" or "add_embedding".
    """
    plan = UNetPlan.of(arguments)
    names = {**ENDS, **_label_names(arguments, vector_place)}
    for part in plan.parts():
        names |= _inner_names(part, plan)
    return names


def pixel_attentions(arguments: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Attention over pixels: its name here, to its name in diffusers and its number of heads."""
    plan = UNetPlan.of(arguments)
    if plan.context_dim is not None:
        return {}
    attentions = (part for part in plan.parts() if part.kind == "attention")
    return {part.ours: (part.theirs, plan.heads(part.channels)) for part in attentions}


def renamed(name: str, names: Mapping[str, str]) -> str | None:
    """The tensor's name when the module that it lies under changes its own, or None when no module is known."""
    cut = name.rfind(".")
    while cut > 0:
        if name[:cut] in names:
            return names[name[:cut]] + name[cut:]
        cut = name.rfind(".", 0, cut)
    return None


def _label_names(arguments: Mapping[str, Any], vector_place: str) -> dict[str, str]:
    if arguments.get("num_classes") is not None:
        return {"label_emb": "class_embedding"}
    if arguments.get("vector_dim") is not None:
        return {"label_emb.0.0": f"{vector_place}.linear_1", "label_emb.0.2": f"{vector_place}.linear_2"}
    return {}


def _inner_names(part: Part, plan: UNetPlan) -> dict[str, str]:
    resamples = part.kind in ("down", "up")
    if part.kind == "residual" or (resamples and plan.resblock_updown):
        return {f"{part.ours}.{ours}": f"{part.theirs}.{theirs}" for ours, theirs in RESIDUAL.items()}
    if resamples:
        return {f"{part.ours}.{'op' if part.kind == 'down' else 'conv'}": f"{part.theirs}.conv"}
    if plan.context_dim is not None:
        return {part.ours: part.theirs}
    return {f"{part.ours}.norm": f"{part.theirs}.group_norm", f"{part.ours}.proj_out": f"{part.theirs}.to_out.0"}
