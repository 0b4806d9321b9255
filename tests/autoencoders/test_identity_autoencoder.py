import pytest
import torch

from ldm.autoencoders import IdentityAutoencoder


def test_images_are_their_own_latents() -> None:
    autoencoder = IdentityAutoencoder()
    images = torch.rand(2, 3, 5, 7) * 2 - 1

    moments = autoencoder.encode(images)

    assert moments.shape == (2, 6, 5, 7)
    torch.testing.assert_close(autoencoder.to_latents(moments, noise=None), images, rtol=0, atol=0)
    torch.testing.assert_close(autoencoder.decode(images), images, rtol=0, atol=0)


def test_noise_in_the_posterior_does_not_show() -> None:
    autoencoder = IdentityAutoencoder()
    images = torch.rand(2, 3, 5, 7) * 2 - 1

    latents = autoencoder.to_latents(autoencoder.encode(images), noise=torch.randn(2, 3, 5, 7))

    torch.testing.assert_close(latents, images, rtol=0, atol=1e-5)


def test_images_of_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got images with values up to 255 in size, expected \[-1, 1\]"):
        IdentityAutoencoder().encode(torch.full((1, 3, 4, 4), 255.0))
