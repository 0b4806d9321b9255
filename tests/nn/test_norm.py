import pytest
import torch
import torch.nn.functional as F

from ldm.nn import GroupNorm32


def test_half_precision_input_is_normalised_in_float32() -> None:
    norm = GroupNorm32(8, groups=2).half()
    x = (100 + torch.randn(2, 8, 5, 5, generator=torch.manual_seed(0))).half()

    expected = F.group_norm(x.float(), 2, eps=1e-5)

    torch.testing.assert_close(norm(x).float(), expected, atol=2e-3, rtol=1e-3)
    assert norm(x).dtype == torch.float16


def test_float64_input_keeps_its_precision() -> None:
    norm = GroupNorm32(4, groups=2).double()
    x = 1e6 + torch.randn(1, 4, 8, generator=torch.manual_seed(0), dtype=torch.float64)

    groups = x.reshape(1, 2, 16)
    expected = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    torch.testing.assert_close(norm(x), expected.reshape(1, 4, 8), atol=1e-8, rtol=0)


def test_eps_is_added_to_the_variance() -> None:
    x = torch.tensor([[[-1e-3, 1e-3]]])

    torch.testing.assert_close(GroupNorm32(1, groups=1, eps=1e-6)(x), x / (2e-6) ** 0.5)


def test_channels_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 48 channels for 32 .* expected a multiple"):
        GroupNorm32(48)
