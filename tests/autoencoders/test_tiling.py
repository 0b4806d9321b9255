import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ldm.autoencoders import (
    GaussianAutoencoder,
    IdentityAutoencoder,
    KLAutoencoder,
    VQAutoencoder,
    decode_tiled,
    encode_tiled,
)


class PixelShuffle(GaussianAutoencoder):
    """Every block of 2x2 pixels is a latent of 12 values: nothing reaches across, so that tiling must be exact."""

    def __init__(self) -> None:
        super().__init__(latent_channels=12, downsampling_factor=2, latent_scale=0.5, latent_shift=0.1)

    def encode(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return rearrange(images, "b c (h i) (w j) -> b (c i j) h w", i=2, j=2).repeat(1, 2, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        return rearrange(self.from_latents(latents), "b (c i j) h w -> b c (h i) (w j)", i=2, j=2)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(kind: type[KLAutoencoder] | type[VQAutoencoder] = KLAutoencoder, seed: int = 0) -> KLAutoencoder:
    torch.manual_seed(seed)
    return kind(base_channels=16, channel_mult=[1, 2, 2], num_res_blocks=1, norm_groups=8).eval()


@given(st.data(), st.integers(1, 20), st.integers(1, 20), st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_tiles_of_any_size_fit_together(data: st.DataObject, height: int, width: int, tile: int) -> None:
    autoencoder, overlap = PixelShuffle(), data.draw(st.integers(0, tile // 2))
    latents, images = random(2, 12, height, width), random(2, 3, 2 * height, 2 * width).clamp(-1, 1)

    assert_close(decode_tiled(autoencoder, latents, tile=tile, overlap=overlap), autoencoder.decode(latents))
    assert_close(encode_tiled(autoencoder, images, tile=tile, overlap=overlap), autoencoder.encode(images))


@pytest.mark.parametrize("kind", [KLAutoencoder, VQAutoencoder])
def test_one_tile_is_the_whole(kind: type[KLAutoencoder] | type[VQAutoencoder]) -> None:
    autoencoder = small(kind)
    latents, images = random(2, autoencoder.latent_channels, 6, 8), random(2, 3, 24, 32).clamp(-1, 1)
    with torch.no_grad():
        decoded, encoded = autoencoder.decode(latents), autoencoder.encode(images)

    assert_close(decode_tiled(autoencoder, latents, tile=8, overlap=2), decoded, rtol=0, atol=0)
    assert_close(encode_tiled(autoencoder, images, tile=8, overlap=2), encoded, rtol=0, atol=0)


def test_no_more_than_a_tile_is_worked_on_at_once() -> None:
    """So that memory does not grow with the picture."""
    autoencoder, seen = small(), []
    for part in (autoencoder.decoder, autoencoder.encoder):
        part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2:]))

    decode_tiled(autoencoder, random(1, 4, 20, 9), tile=8, overlap=2)
    encode_tiled(autoencoder, random(1, 3, 80, 36).clamp(-1, 1), tile=8, overlap=2)

    assert seen == [(8, 8)] * 6 + [(32, 32)] * 6


def seam_errors(tiled: Tensor, whole: Tensor) -> tuple[float, float]:
    """(Root mean square error over the deviation of the picture, the error's worst step from one column to the next
    over the picture's own mean step)."""
    error = tiled - whole
    steps = error.diff(dim=-1).abs().mean((0, 1, 2))
    return (error.square().mean().sqrt() / whole.std()).item(), (steps.max() / whole.diff(dim=-1).abs().mean()).item()


@pytest.mark.parametrize("seed", range(2))
def test_seams_of_normalised_tiles_are_bounded_and_faded(seed: int) -> None:
    """Group normalisation sees a tile's statistics, so tiles differ; overlap hides where they meet.

    Four tiles of 24 x 24 overlapping by 6, and 21 x 21 side by side, of latents and weights that are random.
    """
    autoencoder, latents = small(seed=seed), random(1, 4, 42, 42, seed=seed)
    with torch.no_grad():
        whole = autoencoder.decode(latents)

    error, step = seam_errors(decode_tiled(autoencoder, latents, tile=24, overlap=6), whole)
    hard_error, hard_step = seam_errors(decode_tiled(autoencoder, latents, tile=21, overlap=0), whole)

    print(f"rms {error:.3f} ({hard_error:.3f} without overlap), step {step:.2f} ({hard_step:.2f})")
    assert error < 0.2 and step < 0.5
    assert hard_error > 2 * error and hard_step > 2 * step


def test_seams_of_encoded_tiles_are_bounded() -> None:
    autoencoder, images = small(), random(1, 3, 168, 168).clamp(-1, 1)
    with torch.no_grad():
        whole = autoencoder.encode(images)

    error, step = seam_errors(encode_tiled(autoencoder, images, tile=24, overlap=6), whole)

    print(f"rms {error:.3f}, step {step:.2f}")
    assert error < 0.1 and step < 0.5


def test_tiles_in_half_precision_are_added_up_in_float32() -> None:
    """Weighted parts of a constant picture add up to it within one rounding."""
    latents = torch.full((1, 3, 37, 29), 1 / 3).half()

    tiled = decode_tiled(IdentityAutoencoder().half(), latents, tile=8, overlap=3)

    assert tiled.dtype == torch.float16
    assert_close(tiled, latents, rtol=0, atol=0)


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (8, 5), (8, -1)])
def test_tiles_that_do_not_tile_are_refused(tile: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=f"got tile={tile} and overlap={overlap}, expected a positive tile"):
        decode_tiled(IdentityAutoencoder(), random(1, 3, 4, 4), tile=tile, overlap=overlap)


@pytest.mark.parametrize(("height", "message"), [(33, "got images of 33x64, expected multiples of 4"), (32, "-1, 1")])
def test_images_are_checked_before_they_are_cut(height: int, message: str) -> None:
    outside = torch.full((1, 3, height, 64), 3.0 if height == 32 else 0.0)

    with pytest.raises(ValueError, match=message):
        encode_tiled(small(), outside, tile=8, overlap=2)
