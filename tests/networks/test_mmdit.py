from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from network_helpers import num_parameters, perturbed, relative_difference, seeded
from torch import Tensor

from ldm.diffusion.conditioning import Conditioning
from ldm.networks import MMDiT

SMALL: dict[str, Any] = {
    "patch_size": 2,
    "width": 16,
    "depth": 3,
    "num_heads": 2,
    "context_dim": 6,
    "vector_dim": 5,
    "max_positions": 7,
    "base_positions": 4,
}
# Where our layers stand, and where those of diffusers do; {} is a block.
PLACES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "joint_blocks.{}.x_block.adaLN_modulation.1": "transformer_blocks.{}.norm1.linear",
    "joint_blocks.{}.x_block.attn.proj": "transformer_blocks.{}.attn.to_out.0",
    "joint_blocks.{}.x_block.attn.ln_q": "transformer_blocks.{}.attn.norm_q",
    "joint_blocks.{}.x_block.attn.ln_k": "transformer_blocks.{}.attn.norm_k",
    "joint_blocks.{}.x_block.attn2.proj": "transformer_blocks.{}.attn2.to_out.0",
    "joint_blocks.{}.x_block.attn2.ln_q": "transformer_blocks.{}.attn2.norm_q",
    "joint_blocks.{}.x_block.attn2.ln_k": "transformer_blocks.{}.attn2.norm_k",
    "joint_blocks.{}.x_block.mlp.fc1": "transformer_blocks.{}.ff.net.0.proj",
    "joint_blocks.{}.x_block.mlp.fc2": "transformer_blocks.{}.ff.net.2",
    "joint_blocks.{}.context_block.adaLN_modulation.1": "transformer_blocks.{}.norm1_context.linear",
    "joint_blocks.{}.context_block.attn.proj": "transformer_blocks.{}.attn.to_add_out",
    "joint_blocks.{}.context_block.attn.ln_q": "transformer_blocks.{}.attn.norm_added_q",
    "joint_blocks.{}.context_block.attn.ln_k": "transformer_blocks.{}.attn.norm_added_k",
    "joint_blocks.{}.context_block.mlp.fc1": "transformer_blocks.{}.ff_context.net.0.proj",
    "joint_blocks.{}.context_block.mlp.fc2": "transformer_blocks.{}.ff_context.net.2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
QKV = {
    "x_block.attn": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def to_diffusers(network: MMDiT) -> dict[str, Tensor]:
    """Our weights under the names of diffusers."""
    state, converted = network.state_dict(), {}
    last = len(network.joint_blocks) - 1
    # There, diffusers has the scale before the shift.
    swapped = {f"joint_blocks.{last}.context_block.adaLN_modulation.1", "final_layer.adaLN_modulation.1"}
    for block in range(last + 1):
        for leaf in ("weight", "bias"):
            for ours, theirs in PLACES.items():
                place = ours.format(block)
                if (value := state.get(f"{place}.{leaf}")) is not None:
                    value = torch.cat(value.chunk(2)[::-1]) if place in swapped else value
                    converted[f"{theirs.format(block)}.{leaf}"] = value
            for attention, names in QKV.items():
                if (whole := state.get(f"joint_blocks.{block}.{attention}.qkv.{leaf}")) is not None:
                    for name, part in zip(names, whole.chunk(3), strict=True):
                        converted[f"transformer_blocks.{block}.{name}.{leaf}"] = part
    return converted


def of_diffusers(**changes: Any) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 6,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 5,
            "out_channels": 4,
            "pos_embed_max_size": 7,
            **changes,
        }
    ).eval()


@pytest.mark.parametrize(("qk_norm", "dual"), [(False, 0), (True, 0), (True, 2), (False, 3)])
@pytest.mark.parametrize("size", [(8, 8), (14, 6), (4, 10)])
def test_the_network_equals_that_of_diffusers(qk_norm: bool, dual: int, size: tuple[int, int]) -> None:
    network = perturbed(MMDiT(4, 4, **SMALL, qk_norm=qk_norm, self_attention_blocks=dual), scale=0.2).eval()
    other = of_diffusers(qk_norm="rms_norm" if qk_norm else None, dual_attention_layers=tuple(range(dual)))
    missing, unexpected = other.load_state_dict(to_diffusers(network), strict=False)
    # The table of positions, which must come out of our formula, and a scale that nothing depends on.
    assert unexpected == []
    assert set(missing) <= {"pos_embed.pos_embed", "transformer_blocks.2.attn.norm_added_q.weight"}
    x, t, context, vector = seeded(2, 4, *size), torch.tensor([0.0, 731.5]), seeded(2, 5, 6), seeded(2, 5)

    with torch.no_grad():
        actual = network(x, t, Conditioning(context=context, vector=vector))
        expected = other(x, context, vector, t).sample

    assert relative_difference(actual, expected) <= 1e-4


@pytest.mark.parametrize(("depth", "qk_norm", "dual"), [(24, False, 0), (38, True, 0), (24, True, 13)])
def test_the_network_has_the_parameters_of_that_of_diffusers(depth: int, qk_norm: bool, dual: int) -> None:
    with torch.device("meta"):
        other = of_diffusers(
            num_layers=depth,
            attention_head_dim=64,
            num_attention_heads=depth,
            caption_projection_dim=64 * depth,
            qk_norm="rms_norm" if qk_norm else None,
            dual_attention_layers=tuple(range(dual)),
        )
        geometry = {**SMALL, "width": 64 * depth, "depth": depth, "num_heads": depth}
        network = MMDiT(4, 4, **geometry, qk_norm=qk_norm, self_attention_blocks=dual)

    # Of the last block nothing is kept of the text, so that its normalised queries have no effect: 64 scales.
    assert num_parameters(network) + 64 * qk_norm == num_parameters(other)


def test_the_text_learns_from_the_image_before_the_last_block() -> None:
    network = perturbed(MMDiT(4, 4, **SMALL), scale=0.3)
    image, text, vector = seeded(1, 4, 16), seeded(1, 5, 16, seed=1), seeded(1, 16, seed=2)

    changed = [block(image, text, vector)[1] - block(-image, text, vector)[1] for block in network.joint_blocks]

    assert [difference.abs().max().item() > 1e-3 for difference in changed] == [True, True, False]


def test_an_image_beyond_the_grid_is_refused() -> None:
    cond = Conditioning(context=seeded(1, 5, 6), vector=seeded(1, 5))
    with pytest.raises(ValueError, match="got 8 patches along a side, expected at most 7"):
        MMDiT(4, 4, **SMALL)(seeded(1, 4, 8, 16), torch.zeros(1), cond)


def test_more_blocks_with_self_attention_than_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="got self_attention_blocks 4, expected 0 to the depth, 3"):
        MMDiT(4, 4, **SMALL, self_attention_blocks=4)
