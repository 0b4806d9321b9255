import math

import pytest
import torch
from torch import Tensor, nn

from ldm.nn import GEGLU, AttentionBlock, BasicTransformerBlock, CrossAttention, SpatialTransformer


def perturbed(module: nn.Module) -> nn.Module:
    """Move the parameters off zero, so that zero-initialised branches take part."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of one head, written out: (N, d), (L, d), (L, d) to (N, d)."""
    return torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=1) @ v


def test_cross_attention_equals_softmax_attention_head_by_head() -> None:
    attention = perturbed(CrossAttention(12, num_heads=3, context_dim=5)).double()
    x, context = torch.randn(1, 7, 12).double(), torch.randn(1, 4, 5).double()

    q, k, v = attention.to_q(x)[0], attention.to_k(context)[0], attention.to_v(context)[0]
    heads = [attend(q[:, i : i + 4], k[:, i : i + 4], v[:, i : i + 4]) for i in (0, 4, 8)]

    torch.testing.assert_close(attention(x, context)[0], attention.to_out(torch.cat(heads, dim=1)))


def test_masked_tokens_equal_absent_tokens() -> None:
    attention = CrossAttention(8, num_heads=2, context_dim=6)
    x, context = torch.randn(2, 9, 8), torch.randn(2, 5, 6)
    mask = torch.tensor([[True, True, True, False, False]]).expand(2, 5)

    torch.testing.assert_close(attention(x, context, mask), attention(x, context[:, :3]))


def test_geglu_gates_the_first_half_by_the_exact_gelu_of_the_second() -> None:
    layer = GEGLU(4, 6).double()
    x = torch.randn(2, 3, 4).double()

    value, gate = (x @ layer.proj.weight.T + layer.proj.bias).split(6, dim=-1)
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))

    torch.testing.assert_close(layer(x), value * gelu)


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_block_reads_qkv_rows_in_the_stated_order(new_order: bool) -> None:
    channels, heads, width = 8, 2, 4
    block = perturbed(AttentionBlock(channels, num_heads=heads, new_order=new_order, norm_groups=2)).double()
    x = torch.randn(1, channels, 3, 5).double()

    pixels = block.norm(x).reshape(channels, 15)
    rows = block.qkv.weight[:, :, 0] @ pixels + block.qkv.bias[:, None]
    outputs = []
    for head in range(heads):
        starts = [(part * heads + head if new_order else head * 3 + part) * width for part in range(3)]
        q, k, v = (rows[start : start + width].T for start in starts)
        outputs.append(attend(q, k, v).T)
    out = block.proj_out.weight[:, :, 0] @ torch.cat(outputs) + block.proj_out.bias[:, None]

    torch.testing.assert_close(block(x), x + out.reshape(1, channels, 3, 5))


def test_the_two_qkv_orders_differ_for_equal_weights() -> None:
    old = perturbed(AttentionBlock(8, num_heads=2, norm_groups=2))
    new = AttentionBlock(8, num_heads=2, new_order=True, norm_groups=2)
    new.load_state_dict(old.state_dict())
    x = torch.randn(1, 8, 4, 4)

    assert (old(x) - new(x)).abs().max() > 1e-3


@pytest.mark.parametrize("linear_projection", [False, True])
def test_spatial_transformer_starts_as_the_identity(linear_projection: bool) -> None:
    layer = SpatialTransformer(
        8, num_heads=2, context_dim=3, depth=2, linear_projection=linear_projection, norm_groups=4
    )
    x = torch.randn(2, 8, 4, 6)

    torch.testing.assert_close(layer(x, torch.randn(2, 5, 3)), x, rtol=0, atol=0)


def test_linear_and_convolutional_projections_compute_the_same() -> None:
    conv = perturbed(SpatialTransformer(8, num_heads=2, context_dim=3, norm_groups=4))
    linear = SpatialTransformer(8, num_heads=2, context_dim=3, norm_groups=4, linear_projection=True)
    shapes = {name: parameter.shape for name, parameter in linear.state_dict().items()}
    linear.load_state_dict({name: value.reshape(shapes[name]) for name, value in conv.state_dict().items()})
    x, context = torch.randn(2, 8, 4, 6), torch.randn(2, 5, 3)

    torch.testing.assert_close(linear(x, context), conv(x, context))


def test_without_self_attention_a_pixel_does_not_see_the_others() -> None:
    block = BasicTransformerBlock(8, num_heads=2, context_dim=3, self_attention=False)
    x, context = torch.randn(1, 6, 8), torch.randn(1, 4, 3)
    changed = torch.cat([x[:, :1], torch.randn(1, 5, 8)], dim=1)

    torch.testing.assert_close(block(changed, context)[:, 0], block(x, context)[:, 0])


def test_width_that_does_not_divide_into_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="got 10 channels for 3 attention heads, expected a multiple"):
        CrossAttention(10, num_heads=3)
