import pytest
import torch
from diffusers import DiTTransformer2DModel
from network_helpers import perturbed, relative_difference, seeded
from torch import Tensor

from ldm.diffusion.conditioning import Conditioning
from ldm.networks import DiT

SMALL = {"patch_size": 2, "width": 16, "depth": 2, "num_heads": 2, "num_classes": 7, "learned_variance": True}
# Where our layers stand, and where those of diffusers do; {} is a block.
PLACES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table",
    "blocks.{}.adaLN_modulation.1": "transformer_blocks.{}.norm1.linear",
    "blocks.{}.attn.proj": "transformer_blocks.{}.attn1.to_out.0",
    "blocks.{}.mlp.fc1": "transformer_blocks.{}.ff.net.0.proj",
    "blocks.{}.mlp.fc2": "transformer_blocks.{}.ff.net.2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}


def to_diffusers(dit: DiT) -> dict[str, Tensor]:
    """Our weights under the names of diffusers, whose blocks embed time and class each for itself."""
    state, converted = dit.state_dict(), {}
    for block in range(len(dit.blocks)):
        for leaf in ("weight", "bias"):
            for ours, theirs in PLACES.items():
                if (name := f"{ours.format(block)}.{leaf}") in state:
                    converted[f"{theirs.format(block)}.{leaf}"] = state[name]
            parts = state[f"blocks.{block}.attn.qkv.{leaf}"].chunk(3)
            converted |= {
                f"transformer_blocks.{block}.attn1.to_{part}.{leaf}": value
                for part, value in zip("qkv", parts, strict=True)
            }
    return converted


@pytest.mark.parametrize("patch_size", [2, 4])
def test_the_network_equals_that_of_diffusers(patch_size: int) -> None:
    dit = perturbed(DiT(4, 4, **{**SMALL, "patch_size": patch_size}), scale=0.2).eval()
    other = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        patch_size=patch_size,
        num_embeds_ada_norm=7,
        norm_eps=1e-6,  # as published; the default of diffusers is 1e-5
    ).eval()
    other.load_state_dict(to_diffusers(dit))
    for block in other.transformer_blocks:
        # Its frequencies end at exactly 1/10000; those of the published code, and ours, one step before that.
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, ids = seeded(3, 4, 16, 16), torch.tensor([0.0, 499.0, 999.0]), torch.tensor([0, 6, 7])

    with torch.no_grad():
        actual = dit(x, t, Conditioning(vector=ids))
        expected = other(x, t, ids).sample

    assert relative_difference(actual, expected) <= 1e-4


def test_a_variance_comes_after_the_output_in_as_many_channels() -> None:
    with_it, without = (DiT(4, 4, **{**SMALL, "learned_variance": learned}) for learned in (True, False))
    x, t, cond = seeded(2, 4, 8, 8), torch.tensor([1.0, 2.0]), Conditioning(vector=torch.tensor([0, 1]))

    assert with_it(x, t, cond).shape == (2, 8, 8, 8)
    assert without(x, t, cond).shape == (2, 4, 8, 8)
    assert (with_it.learned_variance, without.learned_variance) == (True, False)


def test_blocks_start_as_the_identity() -> None:
    dit = DiT(4, 4, **{**SMALL, "context_dim": 6})
    tokens = seeded(2, 9, 16)

    torch.testing.assert_close(dit.blocks[0](tokens, seeded(2, 16), seeded(2, 5, 6)), tokens, rtol=0, atol=0)


def test_linear_layers_start_xavier_uniform_and_embeddings_small() -> None:
    torch.manual_seed(0)
    dit = DiT(4, 4, patch_size=2, width=128, depth=1, num_heads=2, num_classes=100)

    bound = (6 / (128 + 512)) ** 0.5
    assert 0.99 * bound < dit.blocks[0].mlp.fc1.weight.abs().max() <= bound
    assert 0.9 * (6 / (16 + 128)) ** 0.5 < dit.x_embedder.proj.weight.abs().max() <= (6 / (16 + 128)) ** 0.5
    for small in (dit.t_embedder.mlp[0].weight, dit.t_embedder.mlp[2].weight, dit.y_embedder.embedding_table.weight):
        assert 0.0195 < small.std() < 0.0205


def test_the_network_tells_places_apart() -> None:
    dit = perturbed(DiT(1, 1, patch_size=2, width=16, depth=1, num_heads=2), scale=0.3)
    constant = torch.ones(1, 1, 8, 12)

    out = dit(constant, torch.zeros(1), Conditioning()).unfold(2, 2, 2).unfold(3, 2, 2).reshape(24, 4)

    assert (torch.cdist(out, out) + torch.eye(24)).min() > 1e-4


ILL_POSED = {
    "heads": ({"num_heads": 3}, "got a width of 16 for 3 attention heads"),
    "class and vector": ({"vector_dim": 4}, "expected at most one"),
}


@pytest.mark.parametrize("name", ILL_POSED)
def test_an_ill_posed_geometry_is_refused(name: str) -> None:
    change, message = ILL_POSED[name]
    with pytest.raises(ValueError, match=message):
        DiT(4, 4, **{**SMALL, **change})


def test_a_width_that_positions_cannot_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="got 18 channels for positions"):
        DiT(4, 4, patch_size=2, width=18, depth=1, num_heads=2)(seeded(1, 4, 4, 4), torch.zeros(1), Conditioning())
