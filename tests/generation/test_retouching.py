"""Each retouching step does what its name says, to pictures and to nothing else."""

import numpy as np
import pytest
from PIL import Image
from skimage.color import lab2rgb, rgb2lab

from ldm.generation.retouching import Denoise, MatchColor, NormalizeIntensity, Pixels, Sharpen, retouched


def smooth(seed: int = 0, *, low: float = 0.3, high: float = 0.7) -> Pixels:
    """A picture of soft blobs, (48, 40, 3), in [low, high]."""
    coarse = np.random.default_rng(seed).uniform(low, high, (6, 5, 3))
    pixels = Image.fromarray((coarse * 255).astype(np.uint8)).resize((40, 48), Image.Resampling.BILINEAR)
    return np.asarray(pixels, dtype=np.float32) / 255


def as_picture(pixels: Pixels) -> Image.Image:
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def lab_statistics(pixels: Pixels) -> np.ndarray:
    lab = rgb2lab(pixels).reshape(-1, 3)
    return np.stack([lab.mean(0), lab.std(0)])


def test_matched_colours_have_the_reference_s_mean_and_spread_in_lab() -> None:
    reference, pixels = smooth(1, low=0.4, high=0.6), smooth(2, low=0.1, high=0.9)
    matched = MatchColor(as_picture(reference))(pixels)
    expected = lab_statistics(np.asarray(as_picture(reference), dtype=np.float32) / 255)
    assert np.abs(lab_statistics(pixels) - expected).max() > 5
    # Nothing here leaves the range of RGB, which would clip.
    assert matched.min() > 0.01 and matched.max() < 0.99
    np.testing.assert_allclose(lab_statistics(matched), expected, atol=0.05)


def test_colours_that_no_screen_shows_are_clipped_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    blue_and_yellow = np.zeros((8, 8, 3), dtype=np.float32)
    blue_and_yellow[:4], blue_and_yellow[4:] = (0, 0, 1), (1, 1, 0)
    grey = np.full((8, 8, 3), 0.5, dtype=np.float32)
    grey[0] = (0.1, 0.1, 0)
    matched = MatchColor(as_picture(blue_and_yellow))(grey)
    assert (matched == 0).any()
    assert not recwarn.list


def test_matching_a_picture_with_itself_changes_nothing() -> None:
    pixels = np.asarray(as_picture(smooth()), dtype=np.float32) / 255
    np.testing.assert_allclose(MatchColor(as_picture(pixels))(pixels), pixels, atol=1e-3)


def test_a_picture_of_one_colour_takes_the_reference_s_mean() -> None:
    grey = np.full((8, 8, 3), 0.5, dtype=np.float32)
    matched = MatchColor(as_picture(smooth(1)))(grey)
    mean = lab_statistics(np.asarray(as_picture(smooth(1)), dtype=np.float32) / 255)[0]
    np.testing.assert_allclose(matched, np.broadcast_to(lab2rgb(mean[None, None])[0, 0], grey.shape), atol=1e-2)


def test_normalising_stretches_over_the_whole_range_and_keeps_the_order_of_channels() -> None:
    pixels = smooth()
    stretched = NormalizeIntensity(low=0, high=100)(pixels)
    assert (stretched.min(), stretched.max()) == (0, 1)
    expected = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    np.testing.assert_allclose(stretched, expected, atol=1e-6)
    clipped = NormalizeIntensity(low=10, high=90)(pixels)
    assert (clipped == 0).mean() == pytest.approx(0.1, abs=0.02)
    flat = np.full((4, 4, 3), 0.2, dtype=np.float32)
    np.testing.assert_array_equal(NormalizeIntensity()(flat), flat)


def test_denoising_brings_a_noisy_picture_nearer_to_the_clean_one() -> None:
    clean = smooth()
    noisy = (clean + np.random.default_rng(0).normal(0, 0.05, clean.shape)).astype(np.float32).clip(0, 1)
    denoised = Denoise(noise=0.05)(noisy)
    assert np.square(denoised - clean).mean() < 0.3 * np.square(noisy - clean).mean()


def test_sharpening_adds_contrast_at_edges_everywhere_and_none_where_all_is_even() -> None:
    edge = np.full((20, 20, 3), 0.3, dtype=np.float32)
    edge[:, 10:] = 0.7
    sharp = Sharpen(radius=1.0, amount=1.0)(edge)
    assert sharp.shape == edge.shape
    np.testing.assert_allclose(sharp[:, [0, -1]], edge[:, [0, -1]], atol=1e-4)
    assert (sharp[:, 9] < 0.25).all() and (sharp[:, 10] > 0.75).all()


def test_steps_follow_each_other_and_none_leaves_the_picture_itself() -> None:
    picture = as_picture(smooth())
    assert retouched(picture, []) is picture
    both = retouched(picture, [NormalizeIntensity(), Sharpen()])
    pixels = Sharpen()(NormalizeIntensity()(np.asarray(picture, dtype=np.float32) / 255))
    np.testing.assert_array_equal(np.asarray(both), np.asarray(as_picture(pixels)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormalizeIntensity(low=60, high=40), r"^got low=60, high=40"),
        (lambda: Denoise(noise=0), r"^got noise=0, expected"),
        (lambda: Sharpen(amount=-1), r"^got radius=1, amount=-1"),
        (lambda: MatchColor("nowhere.png"), r"^reference: got nowhere\.png, where there is no file"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
