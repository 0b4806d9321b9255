import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.nn.resample import FilteredDownsample, FilteredUpsample, resampler

X = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_two_equal_taps_average_pixels_down_and_repeat_them_up() -> None:
    torch.testing.assert_close(resampler("down")(X), FilteredDownsample([1, 1])(X))
    torch.testing.assert_close(resampler("up")(X), FilteredUpsample([1, 1])(X))
    torch.testing.assert_close(resampler("down")(X), F.avg_pool2d(X, 2))
    assert resampler("none")(X) is X


@pytest.mark.parametrize("resample", ["down", "up"])
def test_a_constant_stays_constant_away_from_the_border(resample: str) -> None:
    out = resampler(resample, [1, 3, 3, 1])(torch.full_like(X, 2.5))

    assert out.shape[-2:] == ((4, 3) if resample == "down" else (16, 12))
    torch.testing.assert_close(out[..., 1:-1, 1:-1], torch.full_like(out[..., 1:-1, 1:-1], 2.5))


def test_upsampling_is_the_transpose_of_downsampling_times_four() -> None:
    down, up = resampler("down", [1, 3, 3, 1]), resampler("up", [1, 3, 3, 1])
    small = torch.randn(2, 3, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    torch.testing.assert_close((down(X) * small).sum() * 4, (X * up(small)).sum())


def test_filtering_equals_its_definition_pixel_by_pixel() -> None:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    padded = F.pad(X, (1, 1, 1, 1))

    def pixel(row: int, column: int) -> Tensor:
        window = padded[..., 2 * row : 2 * row + 4, 2 * column : 2 * column + 4]
        return torch.einsum("bcij,i,j->bc", window, taps, taps)

    expected = torch.stack([torch.stack([pixel(r, c) for c in range(3)], -1) for r in range(4)], -2)
    torch.testing.assert_close(FilteredDownsample([1, 3, 3, 1])(X), expected)
    torch.testing.assert_close(FilteredDownsample([1, 3, 3, 1], padded=True)(padded), expected)


@pytest.mark.parametrize("taps", [[1, 2, 1], [1, -1]])
def test_a_filter_that_cannot_resample_is_refused(taps: list[float]) -> None:
    with pytest.raises(ValueError, match="expected an even number of taps with a sum"):
        resampler("up", taps)


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="got resample 'sideways', expected 'none', 'up' or 'down'"):
        resampler("sideways")
