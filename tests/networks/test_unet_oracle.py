"""The U-Net against diffusers, with random weights carried over by name."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from einops import rearrange
from torch import Tensor

from ldm.diffusion.conditioning import Conditioning
from ldm.networks import UNet
from ldm.nn import timestep_embedding

ENDS = [
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("label_emb", "class_embedding"),
    ("input_blocks.0.0", "conv_in"),
    ("middle_block.0", "mid_block.resnets.0"),
    ("middle_block.1", "mid_block.attentions.0"),
    ("middle_block.2", "mid_block.resnets.1"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
]
RESIDUAL = [
    (".in_layers.0.", ".norm1."),
    (".in_layers.2.", ".conv1."),
    (".emb_layers.1.", ".time_emb_proj."),
    (".out_layers.0.", ".norm2."),
    (".out_layers.3.", ".conv2."),
    (".skip_connection.", ".conv_shortcut."),
]


def seeded(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_unet(geometry: Mapping[str, Any]) -> UNet:
    """A network without zero-initialised branches, so that all of it takes part."""
    unet = UNet(**geometry).eval()
    with torch.no_grad():
        for index, parameter in enumerate(unet.parameters()):
            parameter += 0.05 * seeded(tuple(parameter.shape), index)
    return unet


def places(num_res_blocks: list[int]) -> Iterator[tuple[str, str]]:
    """Where our layers stand, and where those of diffusers do; of two that fit a name, the first is meant."""
    yield from ENDS
    index = 1
    for level, count in enumerate(num_res_blocks):
        for position in range(count):
            yield f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{position}"
            yield f"input_blocks.{index}.1", f"down_blocks.{level}.attentions.{position}"
            index += 1
        yield f"input_blocks.{index}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
        yield f"input_blocks.{index}.0", f"down_blocks.{level}.downsamplers.0"
        index += 1
    index = 0
    for step, count in enumerate(reversed(num_res_blocks)):
        for position in range(count + 1):
            yield f"output_blocks.{index}.0", f"up_blocks.{step}.resnets.{position}"
            yield f"output_blocks.{index}.1.conv", f"up_blocks.{step}.upsamplers.0.conv"
            yield f"output_blocks.{index}.1", f"up_blocks.{step}.attentions.{position}"
            yield f"output_blocks.{index}.2", f"up_blocks.{step}.upsamplers.0"
            index += 1


def to_diffusers(state: Mapping[str, Tensor], num_res_blocks: list[int]) -> dict[str, Tensor]:
    """Weights of ours under the names of diffusers."""
    converted = {}
    for name, value in state.items():
        ours, theirs = next(pair for pair in places(num_res_blocks) if name.startswith(f"{pair[0]}."))
        name = theirs + name.removeprefix(ours)
        for old, new in RESIDUAL:
            name = name.replace(old, new)
        converted[name] = value
    return converted


def split_qkv(state: dict[str, Tensor], heads: Mapping[str, int]) -> dict[str, Tensor]:
    """Replace the qkv convolutions of attention over pixels by the three linear layers of diffusers."""
    split: dict[str, Tensor] = {}
    for name, value in state.items():
        if match := re.fullmatch(r"(.*attentions\.\d+)\.(qkv|proj_out|norm)\.(weight|bias)", name):
            place, layer, leaf = match.groups()
            value = value.squeeze(-1) if leaf == "weight" and layer != "norm" else value
            if layer == "qkv":
                parts = rearrange(value, "(h three d) ... -> three (h d) ...", three=3, h=heads[place])
                split |= {f"{place}.to_{part}.{leaf}": parts["qkv".index(part)] for part in "qkv"}
            else:
                split[f"{place}.{'to_out.0' if layer == 'proj_out' else 'group_norm'}.{leaf}"] = value
        else:
            split[name] = value
    return split


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


SMALL = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "num_heads": 4, "context_dim": 24}
THEIRS = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 16,
    "attention_head_dim": 4,  # holds the number of heads, for the sake of old configs
    "cross_attention_dim": 24,
}


def types(*attends: bool) -> dict[str, Any]:
    """Block types of diffusers from whether each level attends."""
    return {
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)],
    }


# Ours, theirs; one row for each thing that the text-conditional families differ in.
TEXT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "convolutional projections, heads by number": (
        {**SMALL, "channel_mult": [1, 2, 2], "num_res_blocks": [2, 2, 2], "attention_resolutions": [1, 2]},
        {**THEIRS, **types(True, True, False), "block_out_channels": (32, 64, 64), "layers_per_block": 2},
    ),
    "linear projections, heads by width": (
        {
            **SMALL,
            "channel_mult": [1, 2, 2],
            "num_res_blocks": [1, 1, 1],
            "attention_resolutions": [1, 2, 4],
            "num_heads": None,
            "num_head_channels": 16,
            "use_linear_projection": True,
        },
        {
            **THEIRS,
            **types(True, True, True),
            "block_out_channels": (32, 64, 64),
            "layers_per_block": 1,
            "attention_head_dim": (2, 4, 4),
            "use_linear_projection": True,
        },
    ),
    "classes, no self-attention by level": (
        {
            **SMALL,
            "channel_mult": [1, 2, 2],
            "num_res_blocks": [1, 1, 1],
            "attention_resolutions": [2, 4],
            "use_linear_projection": True,
            "disable_self_attention": [True, True, False],
            "num_classes": 9,
        },
        {
            **THEIRS,
            **types(False, True, True),
            "block_out_channels": (32, 64, 64),
            "layers_per_block": 1,
            "use_linear_projection": True,
            "only_cross_attention": (True, True, False),
            "num_class_embeds": 9,
        },
    ),
    "depth and blocks by level, vector": (
        {
            **SMALL,
            "channel_mult": [1, 2, 2],
            "num_res_blocks": [1, 2, 1],
            "attention_resolutions": [2, 4],
            "use_linear_projection": True,
            "transformer_depth": [1, 2, 3],
            "vector_dim": 10 + 6 * 8,
        },
        {
            **THEIRS,
            **types(False, True, True),
            "block_out_channels": (32, 64, 64),
            "layers_per_block": (1, 2, 1),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2, 3),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 10 + 6 * 8,
        },
    ),
}


@pytest.mark.parametrize("name", TEXT)
def test_text_conditional_network_equals_diffusers(name: str) -> None:
    ours, theirs = TEXT[name]
    unet, other = random_unet(ours), UNet2DConditionModel(**theirs).eval()
    other.load_state_dict(to_diffusers(unet.state_dict(), ours["num_res_blocks"]))
    x, t, context = seeded((2, 4, 16, 16), 1), torch.tensor([3.0, 750.0]), seeded((2, 5, 24), 2)
    mask: Tensor | None = torch.tensor([[True] * 5, [True, True, True, False, False]])
    if "disable_self_attention" in ours:
        mask = None  # diffusers masks only the second attention of a block, and here the first sees the context too
    pooled, sizes = seeded((2, 10), 3), torch.tensor([[512.0, 640, 0, 16, 512, 512]]).expand(2, 6)
    vector: Tensor | None = None
    if "num_classes" in ours:
        vector = torch.tensor([2, 8])
    elif "vector_dim" in ours:
        vector = torch.cat([pooled, timestep_embedding(sizes.flatten(), 8).reshape(2, 48)], dim=1)

    with torch.no_grad():
        actual = unet(x, t, Conditioning(context=context, mask=mask, vector=vector))
        expected = other(
            x,
            t,
            context,
            encoder_attention_mask=mask,
            class_labels=vector,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
        ).sample

    assert relative_difference(actual, expected) <= 1e-4


PIXELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "heads by width": (
        {"attention_resolutions": [2, 4], "num_head_channels": 8},
        {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
    ),
    "scale and shift, resampling blocks": (
        {
            "attention_resolutions": [1, 2, 4],
            "num_head_channels": 8,
            "use_scale_shift_norm": True,
            "resblock_updown": True,
        },
        {
            "down_block_types": ("AttnDownBlock2D",) * 3,
            "up_block_types": ("AttnUpBlock2D",) * 3,
            "resnet_time_scale_shift": "scale_shift",
            "downsample_type": "resnet",
            "upsample_type": "resnet",
        },
    ),
}


@pytest.mark.parametrize("name", PIXELS)
def test_unconditional_network_equals_diffusers(name: str) -> None:
    change, theirs = PIXELS[name]
    unet = random_unet(
        {"in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2, 2], "num_res_blocks": 2}
        | change
    )
    other = UNet2DModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        attention_head_dim=8,
        flip_sin_to_cos=True,
        freq_shift=0,
        norm_eps=1e-5,
        attn_norm_num_groups=32,
        **theirs,
    ).eval()
    state = to_diffusers(unet.state_dict(), [2, 2, 2])
    heads = {key.removesuffix(".qkv.bias"): len(value) // 24 for key, value in state.items() if "qkv.bias" in key}
    other.load_state_dict(split_qkv(state, heads))
    x, t = seeded((2, 4, 16, 16), 1), torch.tensor([3.0, 750.0])

    with torch.no_grad():
        actual, expected = unet(x, t, Conditioning()), other(x, t).sample

    assert relative_difference(actual, expected) <= 1e-4
