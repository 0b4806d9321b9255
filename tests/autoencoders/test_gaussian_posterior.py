import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.autoencoders import DiagonalGaussian, IdentityAutoencoder


def moments() -> torch.Tensor:
    return torch.randn(3, 8, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_kl_is_the_divergence_from_the_standard_normal_in_nats_a_sample() -> None:
    posterior = DiagonalGaussian.from_moments(moments())
    mean, logvar = moments()[:, :4], moments()[:, 4:]

    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))

    torch.testing.assert_close(posterior.kl(), expected)


def test_kl_of_half_precision_moments_is_taken_in_float32() -> None:
    half = moments().half()

    kl = DiagonalGaussian.from_moments(half).kl()

    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, DiagonalGaussian.from_moments(half.float()).kl())


def test_samples_have_the_mean_and_deviation_of_the_posterior() -> None:
    posterior = DiagonalGaussian(torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 2 * math.log(3.0)))
    noise = torch.randn(100_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))

    samples = posterior.sample(noise)

    torch.testing.assert_close(samples.mean(), torch.tensor(2.0), rtol=0, atol=0.05)
    torch.testing.assert_close(samples.std(), torch.tensor(3.0), rtol=0, atol=0.05)


def test_log_variance_is_clamped() -> None:
    posterior = DiagonalGaussian.from_moments(torch.tensor([0.0, 0.0, -1e4, 1e4]).reshape(1, 4, 1, 1))

    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]


def test_latents_are_shifted_then_scaled_and_back() -> None:
    autoencoder = IdentityAutoencoder(latent_scale=0.5, latent_shift=0.2).double()
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64) * 2 - 1

    latents = autoencoder.to_latents(autoencoder.encode(images), noise=None)

    torch.testing.assert_close(latents, (images - 0.2) * 0.5, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(autoencoder.decode(latents), images)


def test_a_new_latent_scale_is_kept_in_the_state_dict() -> None:
    autoencoder, other = IdentityAutoencoder(), IdentityAutoencoder()

    autoencoder.set_latent_scale(3.0, -1.0)
    other.load_state_dict(autoencoder.state_dict())

    assert (other.latent_scale.item(), other.latent_shift.item()) == (3.0, -1.0)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_not_positive_and_finite_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="expected a positive and a finite number"):
        IdentityAutoencoder(latent_scale=scale)


def test_each_channel_may_have_a_scale_and_shift_of_its_own() -> None:
    """As EDM2 whitens the latents of Stable Diffusion: (value - raw_mean) / raw_std * 0.5."""
    scale, shift = [0.5, 2.0, 1.0], [0.1, -0.2, 0.0]
    autoencoder = IdentityAutoencoder(latent_scale=scale, latent_shift=shift).double()
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64) * 2 - 1

    latents = autoencoder.to_latents(autoencoder.encode(images), noise=None)

    for channel in range(3):
        expected = (images[:, channel] - shift[channel]) * scale[channel]
        torch.testing.assert_close(latents[:, channel], expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(autoencoder.decode(latents), images, rtol=0, atol=1e-6)
    other = IdentityAutoencoder(latent_scale=[1.0, 1.0, 1.0], latent_shift=[0.0, 0.0, 0.0])
    other.load_state_dict(autoencoder.state_dict())
    assert other.latent_scale.flatten().tolist() == pytest.approx(scale)
    autoencoder.set_latent_scale(3.0)
    assert autoencoder.latent_scale.shape == autoencoder.latent_shift.shape == ()


def test_a_scale_for_another_number_of_channels_is_refused() -> None:
    with pytest.raises(
        ValueError, match="got a latent scale or shift of 2 numbers, expected one, or one for each of 3"
    ):
        IdentityAutoencoder(latent_scale=[1.0, 2.0])
