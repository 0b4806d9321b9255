import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.nn import Downsample, ResBlock, SpatialTransformer, TimestepSequential, Upsample


def test_residual_block_starts_as_the_identity() -> None:
    block = ResBlock(8, 8, emb_dim=4, norm_groups=4)
    x = torch.randn(2, 8, 5, 5)

    torch.testing.assert_close(block(x, torch.randn(2, 4)), x, rtol=0, atol=0)


@pytest.mark.parametrize(("resample", "size"), [("none", 8), ("up", 16), ("down", 4)])
def test_residual_block_resamples_branch_and_skip(resample: str, size: int) -> None:
    block = ResBlock(8, 16, emb_dim=4, norm_groups=4, resample=resample)

    assert block(torch.randn(2, 8, 8, 8), torch.randn(2, 4)).shape == (2, 16, size, size)


def test_scale_shift_norm_modulates_the_second_norm() -> None:
    block = ResBlock(4, 4, emb_dim=3, norm_groups=2, scale_shift_norm=True).double()
    nn.init.normal_(block.out_layers[3].weight)
    x, emb = torch.randn(1, 4, 6, 6).double(), torch.randn(1, 3).double()

    h = block.in_layers(x)
    scale, shift = block.emb_layers(emb)[:, :, None, None].split(4, dim=1)
    h = F.group_norm(h, 2, eps=1e-5) * (1 + scale) + shift

    torch.testing.assert_close(block(x, emb), x + block.out_layers[3](F.silu(h)))


def test_dropout_acts_in_training_alone() -> None:
    block = ResBlock(4, 4, emb_dim=3, norm_groups=2, dropout=0.5)
    nn.init.normal_(block.out_layers[3].weight)
    x, emb = torch.randn(1, 4, 6, 6), torch.randn(1, 3)

    assert not torch.equal(block(x, emb), block(x, emb))
    block.eval()
    torch.testing.assert_close(block(x, emb), block(x, emb), rtol=0, atol=0)


def test_downsampling_pads_every_side() -> None:
    layer = Downsample(1)
    nn.init.ones_(layer.op.weight)
    nn.init.zeros_(layer.op.bias)

    # The first window reaches over the left and upper edge, the last one ends at the other edges.
    torch.testing.assert_close(layer(torch.ones(1, 1, 4, 4))[0, 0], torch.tensor([[4.0, 6.0], [6.0, 9.0]]))


def test_upsampling_repeats_pixels_before_its_convolution() -> None:
    layer = Upsample(1)
    nn.init.dirac_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)
    x = torch.arange(4.0).reshape(1, 1, 2, 2)

    torch.testing.assert_close(layer(x), x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


def test_the_sequence_hands_each_child_what_it_takes() -> None:
    block = ResBlock(8, 8, emb_dim=4, norm_groups=4)
    transformer = SpatialTransformer(8, num_heads=2, context_dim=3, norm_groups=4)
    for parameter in (*block.out_layers[3].parameters(), *transformer.proj_out.parameters()):
        nn.init.normal_(parameter)
    x, emb, context = torch.randn(2, 8, 4, 4), torch.randn(2, 4), torch.randn(2, 5, 3)
    mask = torch.tensor([True, True, False, False, True]).expand(2, 5)

    upsample = Upsample(8)

    torch.testing.assert_close(
        TimestepSequential(block, transformer, upsample)(x, emb, context, mask),
        upsample(transformer(block(x, emb), context, mask)),
    )


def test_an_unknown_way_to_resample_is_refused() -> None:
    with pytest.raises(ValueError, match="got resample 'sideways', expected 'none', 'up' or 'down'"):
        ResBlock(8, 8, emb_dim=4, resample="sideways")
