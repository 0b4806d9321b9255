from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion.conditioning import Conditioning
from ldm.networks import UNet

PIXELS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 3,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "num_heads": 2,
    "norm_groups": 4,
}
TEXT = {**PIXELS, "context_dim": 6}

GEOMETRIES: dict[str, Mapping[str, Any]] = {
    "pixels": PIXELS,
    "pixels, new order": {**PIXELS, "new_attention_order": True},
    "pixels, resampling blocks": {**PIXELS, "resblock_updown": True, "use_scale_shift_norm": True},
    "text": TEXT,
    "text, linear and deep": {**TEXT, "use_linear_projection": True, "transformer_depth": [1, 2]},
    "text, no self-attention": {**TEXT, "disable_self_attention": [False, True], "num_classes": 5},
    "text, vector": {**TEXT, "vector_dim": 7, "num_res_blocks": [1, 2]},
}


def perturbed(module: nn.Module) -> nn.Module:
    """Move the parameters off zero, so that zero-initialised branches take part."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


def inputs(geometry: Mapping[str, Any], batch: int = 2) -> tuple[Tensor, Tensor, Conditioning]:
    """A noisy sample, times and the conditions that the geometry takes."""
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(batch, 5, 6, generator=generator) if geometry.get("context_dim") else None
    vector = None
    if geometry.get("num_classes"):
        vector = torch.arange(batch)
    elif geometry.get("vector_dim"):
        vector = torch.randn(batch, 7, generator=generator)
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    return x, torch.linspace(1, 900, batch), Conditioning(context=context, vector=vector)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradient_reaches_every_parameter(name: str) -> None:
    unet = perturbed(UNet(**GEOMETRIES[name]))

    unet(*inputs(GEOMETRIES[name], batch=5)).square().mean().backward()

    assert [key for key, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_output_starts_at_zero(name: str) -> None:
    out = UNet(**GEOMETRIES[name])(*inputs(GEOMETRIES[name]))

    torch.testing.assert_close(out, torch.zeros(2, 3, 8, 8), rtol=0, atol=0)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_recomputed_blocks_give_the_same_gradients(name: str) -> None:
    kept = perturbed(UNet(**GEOMETRIES[name]))
    recomputed = UNet(**GEOMETRIES[name], checkpoint_blocks=True)
    recomputed.load_state_dict(kept.state_dict())

    for unet in (kept, recomputed):
        unet(*inputs(GEOMETRIES[name])).square().mean().backward()

    for expected, actual in zip(kept.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=0, atol=0)


def test_recomputed_blocks_keep_fewer_tensors_for_the_backward_pass() -> None:
    kept: dict[bool, int] = {}
    for checkpoint_blocks in (False, True):
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            UNet(**TEXT, checkpoint_blocks=checkpoint_blocks)(*inputs(TEXT))
        kept[checkpoint_blocks] = sum(sizes)

    assert kept[True] < 0.2 * kept[False]


def test_a_masked_token_does_not_reach_the_output() -> None:
    unet = perturbed(UNet(**TEXT, disable_self_attention=[False, True])).double()
    x, t, cond = inputs(TEXT)
    context = cond.context.double()
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    other = torch.where(mask[..., None], context, torch.full_like(context, 100.0))

    masked = unet(x.double(), t.double(), Conditioning(context=context, mask=mask))

    torch.testing.assert_close(unet(x.double(), t.double(), Conditioning(context=other, mask=mask)), masked)
    torch.testing.assert_close(unet(x[1:].double(), t[1:].double(), Conditioning(context=context[1:, :3])), masked[1:])


def test_every_condition_changes_the_output() -> None:
    geometry = {**TEXT, "vector_dim": 7, "in_channels": 6}
    unet = perturbed(UNet(**geometry))
    x, t, cond = inputs(geometry)
    parts = {"context": cond.context, "vector": cond.vector, "concat": torch.randn(2, 2, 8, 8)}
    out = unet(x, t, Conditioning(**parts))

    changes = {name: unet(x, t, Conditioning(**{**parts, name: 2 * part})) for name, part in parts.items()}
    changes["t"] = unet(x, 2 * t, Conditioning(**parts))

    assert {name for name, changed in changes.items() if (changed - out).abs().max() < 1e-4} == set()


def test_concatenated_channels_follow_those_of_the_sample() -> None:
    unet = perturbed(UNet(**PIXELS))
    x, t, _ = inputs(PIXELS)

    torch.testing.assert_close(unet(x[:, :3], t, Conditioning(concat=x[:, 3:])), unet(x, t, Conditioning()))


def test_samples_of_a_batch_do_not_mix() -> None:
    unet = perturbed(UNet(**TEXT)).double()
    x, t, cond = inputs(TEXT, batch=3)
    x, t, cond = x.double(), t.double(), Conditioning(context=cond.context.double())

    torch.testing.assert_close(unet(x[1:2], t[1:2], cond[1:2]), unet(x, t, cond)[1:2])


def test_middle_attends_to_the_context_where_no_level_does() -> None:
    unet = perturbed(UNet(**{**TEXT, "attention_resolutions": []}))
    x, t, cond = inputs(TEXT)

    changed = unet(x, t, Conditioning(context=2 * cond.context))

    assert (changed - unet(x, t, cond)).abs().max() > 1e-4


def test_bfloat16_autocast_stays_close_to_float32() -> None:
    unet = perturbed(UNet(**TEXT))
    expected = unet(*inputs(TEXT))

    with torch.autocast("cpu", torch.bfloat16):
        out = unet(*inputs(TEXT))

    assert (out.float() - expected).abs().max() < 0.03 * expected.abs().max()


ILL_POSED: dict[str, tuple[Mapping[str, Any], str]] = {
    "no heads": ({"num_heads": None}, "got num_heads None and num_head_channels None, expected exactly one"),
    "heads twice": ({"num_head_channels": 4}, "got num_heads 2 and num_head_channels 4, expected exactly one"),
    "channels by groups": ({"norm_groups": 5}, "got 8 channels for 5 normalisation groups, expected a multiple"),
    "channels by heads": ({"num_heads": 3}, "got 16 channels for 3 attention heads, expected a multiple"),
    "channels by head width": (
        {"num_heads": None, "num_head_channels": 5},
        "got 16 channels for heads of 5 channels, expected a multiple",
    ),
    "depth without context": ({"transformer_depth": 2}, "without context_dim, expected their defaults"),
    "projection without context": ({"use_linear_projection": True}, "without context_dim, expected their defaults"),
    "order with context": (
        {"context_dim": 6, "new_attention_order": True},
        "got new_attention_order together with context_dim, expected one",
    ),
    "depth of zero": ({"context_dim": 6, "transformer_depth": [0, 1]}, "expected at least 1 on every level"),
    "blocks for other levels": ({"num_res_blocks": [1, 1, 1]}, "got num_res_blocks of length 3, expected 2"),
    "a level without blocks": ({"num_res_blocks": 0}, r"got num_res_blocks \[0, 0\], expected at least 1"),
    "no levels": ({"channel_mult": []}, "got an empty channel_mult, expected at least one level"),
    "class and vector": ({"num_classes": 3, "vector_dim": 4}, "expected at most one"),
}


@pytest.mark.parametrize("name", ILL_POSED)
def test_an_ill_posed_geometry_is_refused(name: str) -> None:
    change, message = ILL_POSED[name]

    with pytest.raises(ValueError, match=message):
        UNet(**{**PIXELS, **change})


CONTEXT = torch.zeros(2, 5, 6)
MISFITS: dict[str, tuple[Mapping[str, Any], Conditioning, str]] = {
    "context not taken": (PIXELS, Conditioning(context=CONTEXT), "without context_dim, expected neither"),
    "context missing": (TEXT, Conditioning(), "got no context, expected one of width 6"),
    "context of another width": (TEXT, Conditioning(context=CONTEXT[..., :4]), "got a context of width 4"),
    "vector not taken": (PIXELS, Conditioning(vector=torch.zeros(2, 7)), "got a vector condition, expected none"),
    "vector missing": ({**PIXELS, "vector_dim": 7}, Conditioning(), "got no vector condition, expected one"),
    "vector of another width": (
        {**PIXELS, "vector_dim": 7},
        Conditioning(vector=torch.zeros(2, 4)),
        r"of shape \(2, 4\), expected \(B, 7\)",
    ),
    "classes that are not ids": (
        {**PIXELS, "num_classes": 7},
        Conditioning(vector=torch.zeros(2, 7)),
        "expected class ids int64",
    ),
    "channels left over": (PIXELS, Conditioning(concat=torch.zeros(2, 1, 8, 8)), "got 5 channels .* in_channels 4"),
    "concat of another size": (PIXELS, Conditioning(concat=torch.zeros(2, 1, 4, 4)), "expected the same size"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_conditions_that_do_not_fit_are_refused(name: str) -> None:
    geometry, cond, message = MISFITS[name]

    with pytest.raises(ValueError, match=message):
        UNet(**geometry)(torch.zeros(2, 4, 8, 8), torch.zeros(2), cond)


def test_a_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="got an input of 8x7, expected multiples of 2"):
        UNet(**PIXELS)(torch.zeros(1, 4, 8, 7), torch.zeros(1), Conditioning())
