from typing import Any

import pytest
import torch
from network_helpers import perturbed, seeded
from torch import Tensor, nn

from ldm.diffusion import Denoiser, parameterizations, schedules, times, weightings
from ldm.diffusion.conditioning import Conditioning
from ldm.networks import MicroDiT
from ldm.nn.experts import ExpertChoice
from ldm.training.ema import EMA

SMALL: dict[str, Any] = {
    "patch_size": 2,
    "width": 16,
    "depth": 3,
    "head_width": 8,
    "mixer_width": 8,
    "mixer_depth": 2,
    "context_dim": 6,
    "num_experts": 4,
}
X, TIMES, COND = seeded(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9]), Conditioning(context=seeded(3, 5, 6, seed=1))

# The names of the published weights, but for pos_embed and mask_token.
AROUND = [
    "x_embedder.proj.weight",
    "x_embedder.proj.bias",
    "t_embedder.mlp.0.weight",
    "t_embedder.mlp.0.bias",
    "t_embedder.mlp.2.weight",
    "t_embedder.mlp.2.bias",
    "y_embedder.y_proj.fc1.weight",
    "y_embedder.y_proj.fc1.bias",
    "y_embedder.y_proj.norm.weight",
    "y_embedder.y_proj.fc2.weight",
    "y_embedder.y_proj.fc2.bias",
    "y_emb_preprocess.norm1.weight",
    "y_emb_preprocess.attn.qkv.weight",
    "y_emb_preprocess.attn.proj.weight",
    "y_emb_preprocess.norm2.weight",
    "y_emb_preprocess.mlp.w1.weight",
    "y_emb_preprocess.mlp.w2.weight",
    "y_emb_preprocess.mlp.w3.weight",
    "pooled_y_emb_process.fc1.weight",
    "pooled_y_emb_process.fc1.bias",
    "pooled_y_emb_process.norm.weight",
    "pooled_y_emb_process.fc2.weight",
    "pooled_y_emb_process.fc2.bias",
    "patch_mixer_map_xin.0.weight",
    "patch_mixer_map_xin.1.weight",
    "patch_mixer_map_xout.0.weight",
    "patch_mixer_map_xout.1.weight",
    "patch_mixer_map_y.0.weight",
    "patch_mixer_map_y.1.weight",
    "final_layer.linear.weight",
    "final_layer.linear.bias",
    "final_layer.norm_final.weight",
    "final_layer.adaLN_modulation.1.weight",
    "final_layer.adaLN_modulation.1.bias",
]
OF_BLOCKS = [
    "norm1.weight",
    "norm2.weight",
    "norm3.weight",
    "attn.qkv.weight",
    "attn.proj.weight",
    "cross_attn.q_linear.weight",
    "cross_attn.kv_linear.weight",
    "cross_attn.proj.weight",
    "adaLN_modulation.1.weight",
    "adaLN_modulation.1.bias",
]
OF_DENSE = ["mlp.w1.weight", "mlp.w2.weight", "mlp.w3.weight"]
OF_EXPERTS = ["mlp.w1", "mlp.w2", "mlp.gate.weight"]


def micro(**changes: Any) -> MicroDiT:
    torch.manual_seed(0)
    return perturbed(MicroDiT(4, 4, **{**SMALL, **changes}), scale=0.2)


def without_attention(network: MicroDiT) -> MicroDiT:
    """With neither mixer nor blocks a patch's output depends on that patch, its place, time and text alone."""
    network.patch_mixer, network.blocks = nn.ModuleList(), nn.ModuleList()
    return network


def patches(image: Tensor) -> Tensor:
    """(B, C, H, W) as (B, N, C, 4)."""
    return image.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(2, 3).transpose(1, 2)


def denoiser(network: nn.Module) -> Denoiser:
    return Denoiser(
        network,
        schedule=schedules.EDM(sigma_data=0.9),
        parameterization=parameterizations.EDM(),
        weighting=weightings.EDM(sigma_data=0.9),
        times=times.LogNormal(p_mean=-0.6, p_std=1.2),
    )


def test_parameters_have_the_published_names() -> None:
    expected = set(AROUND)
    for blocks, layers in {"patch_mixer": [OF_DENSE, OF_EXPERTS], "blocks": [OF_DENSE, OF_EXPERTS, OF_DENSE]}.items():
        for index, of_layer in enumerate(layers):
            expected |= {f"{blocks}.{index}.{name}" for name in [*OF_BLOCKS, *of_layer]}

    assert set(micro().state_dict()) == expected


def test_blocks_are_as_wide_as_published_and_every_other_one_is_of_experts() -> None:
    """Of MicroDiT-XL/2, as counted in the released network."""
    with torch.device("meta"):
        network = MicroDiT(
            4, 4, patch_size=2, width=1024, depth=28, head_width=64, mixer_width=768, mixer_depth=6, context_dim=1024
        )
    attention = [block.attn.proj.in_features for block in network.blocks]
    dense = [block.mlp.w1.out_features for block in network.blocks if not isinstance(block.mlp, ExpertChoice)]
    experts = [block.mlp.w1.shape[2] for block in network.blocks if isinstance(block.mlp, ExpertChoice)]

    assert attention == [512] + 6 * [640] + 7 * [768] + 7 * [896] + 7 * [1024]
    assert dense == [512, 768, 768, 1024, 1280, 1280, 1536, 1792, 1792, 2048, 2304, 2304, 2560, 2816, 2816]
    assert experts == [768, 1024, 1280, 1536, 1792, 2048, 2304, 2560, 2816, 3072, 3328, 3584, 3840]
    assert [isinstance(block.mlp, ExpertChoice) for block in network.patch_mixer] == 3 * [False, True]


@pytest.mark.parametrize(("share", "num_kept"), [(0.75, 4), (0.5, 8), (0.9, 1), (0.99, 1)])
def test_in_training_the_output_says_for_which_patches_it_is(share: float, num_kept: int) -> None:
    network = micro(drop_patches=share).train()

    out = network(X, TIMES, COND)

    assert network.drops_patches and out.shape == (3, 5, 8, 8)
    given = patches(out[:, -1:])
    assert set(given.unique().tolist()) == {0.0, 1.0}
    assert (given.amin((2, 3)) == given.amax((2, 3))).all(), "a patch is kept whole"
    assert given[:, :, 0, 0].sum(1).tolist() == [num_kept] * 3
    assert (out[:, :4][(out[:, -1:] == 0).expand(-1, 4, -1, -1)] == 0).all()
    assert (out[:, :4][(out[:, -1:] == 1).expand(-1, 4, -1, -1)] != 0).all()


def test_each_sample_drops_patches_of_its_own_by_torchs_generator() -> None:
    network = micro(drop_patches=0.5).train()

    def kept(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return network(X, TIMES, COND)[:, -1]

    assert torch.equal(kept(0), kept(0))
    assert not torch.equal(kept(0), kept(1))
    assert len(kept(0).unique(dim=0)) == 3
    assert torch.stack([kept(seed) for seed in range(100)]).mean((0, 1)).sub(0.5).abs().max() < 0.15


def test_an_answer_lies_where_its_patch_was() -> None:
    network = without_attention(micro(drop_patches=0.5))
    whole = network.eval()(X, TIMES, COND)

    out = network.train()(X, TIMES, COND)

    torch.testing.assert_close(out[:, :4], whole * out[:, -1:])


def test_in_evaluation_and_in_an_average_nothing_is_dropped() -> None:
    network = micro(drop_patches=0.75).train()
    average = EMA(network, decay=0.5).train().module

    assert (network.drops_patches, average.drops_patches) == (True, False)
    assert average(X, TIMES, COND).shape == X.shape
    torch.testing.assert_close(network.eval()(X, TIMES, COND), average(X, TIMES, COND), rtol=0, atol=0)
    assert not micro().train().drops_patches


def test_the_mixer_sees_the_patches_that_are_dropped() -> None:
    network = micro(drop_patches=0.75).train()
    outputs = []
    for x in (X, -X):
        torch.manual_seed(3)
        given = network(x, TIMES, COND)[:, -1:]
        torch.manual_seed(3)
        outputs.append(network(torch.where(given == 1, X, x), TIMES, COND))

    assert (outputs[1] - outputs[0]).abs().amax((1, 2, 3)).min() > 1e-4


def test_the_loss_is_the_mean_squared_error_of_the_patches_that_are_kept() -> None:
    """As published: the error of x_0, weighted, its mean over channels and then over what is kept."""
    network = micro(drop_patches=0.75).train()
    model, eps, sigma = denoiser(network), seeded(3, 4, 8, 8, seed=5), torch.tensor([0.2, 0.7, 2.0])

    torch.manual_seed(1)
    found = model.loss(X, eps, sigma, COND)
    torch.manual_seed(1)
    prediction = model(X + sigma.view(-1, 1, 1, 1) * eps, sigma, COND)
    torch.manual_seed(1)
    given = network(X, TIMES, COND)[:, -1:]

    weight = (sigma**2 + 0.9**2) / (sigma * 0.9) ** 2
    for sample in range(3):
        kept = (given[sample] == 1).expand(4, -1, -1)
        error = (prediction.x_0[sample][kept] - X[sample][kept]).square()
        assert error.numel() == 64
        torch.testing.assert_close(found[sample], weight[sample] * error.mean())


def test_gradient_reaches_every_parameter_from_the_kept_patches() -> None:
    network = micro(drop_patches=0.5).train()

    denoiser(network).loss(X, seeded(3, 4, 8, 8, seed=5), TIMES, COND).mean().backward()

    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_recomputed_blocks_see_the_same_patches() -> None:
    gradients = []
    for recompute in (False, True):
        network = micro(drop_patches=0.5, checkpoint_blocks=recompute).train()
        torch.manual_seed(2)
        network(X, TIMES, COND).square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])

    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_bfloat16_marks_the_same_patches() -> None:
    network = micro(drop_patches=0.75).train()
    torch.manual_seed(2)
    expected = network(X, TIMES, COND)

    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(2)
        out = network(X, TIMES, COND)

    torch.testing.assert_close(out[:, -1:].float(), expected[:, -1:], rtol=0, atol=0)


def test_positions_of_images_twice_as_large_are_half_as_far_apart() -> None:
    small = without_attention(micro()).eval()
    large = without_attention(micro(position_scale=2.0)).eval()

    expected = patches(small(torch.ones(3, 4, 8, 8), TIMES, COND)).reshape(3, 4, 4, -1)
    found = patches(large(torch.ones(3, 4, 16, 16), TIMES, COND)).reshape(3, 8, 8, -1)

    torch.testing.assert_close(found[:, ::2, ::2], expected)
    assert (found[:, 1::2, ::2] - expected).abs().amax(-1).min() > 1e-4


def test_text_starts_as_it_is_embedded() -> None:
    torch.manual_seed(0)
    network = MicroDiT(4, 4, **SMALL)
    text = seeded(2, 5, 16)

    torch.testing.assert_close(network.y_emb_preprocess(text), text, rtol=0, atol=0)


def test_deeper_blocks_start_with_smaller_ways_out() -> None:
    torch.manual_seed(0)
    network = MicroDiT(4, 4, **{**SMALL, "width": 128, "depth": 8, "mixer_width": 128})

    for index, block in enumerate(network.blocks):
        for out in (block.attn.proj.weight, block.cross_attn.proj.weight):
            assert out.std().item() == pytest.approx(0.02 / (2 * (index + 1)) ** 0.5, rel=0.05)
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert network.patch_mixer[0].attn.proj.weight.std().item() == pytest.approx(0.02 / 16**0.5, rel=0.05)


ILL_POSED = {
    "all dropped": ({"drop_patches": 1.0}, r"got drop_patches 1\.0, expected a share"),
    "heads": ({"width": 20}, "got a width of 20, expected a multiple of head_width 8"),
}


@pytest.mark.parametrize("name", ILL_POSED)
def test_an_ill_posed_geometry_is_refused(name: str) -> None:
    change, message = ILL_POSED[name]
    with pytest.raises(ValueError, match=message):
        MicroDiT(4, 4, **{**SMALL, **change})


def test_a_mask_of_the_text_is_refused() -> None:
    cond = Conditioning(context=COND.context, mask=torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="got a mask of the context, expected none"):
        micro()(X, TIMES, cond)
