"""Autoencoders: between images in [-1, 1] and the latents that diffusion works on."""

from ldm.autoencoders.decoder import Decoder
from ldm.autoencoders.encoder import Encoder
from ldm.autoencoders.gaussian import DiagonalGaussian, GaussianAutoencoder
from ldm.autoencoders.identity import IdentityAutoencoder
from ldm.autoencoders.kl import KLAutoencoder

__all__ = [
    "Decoder",
    "DiagonalGaussian",
    "Encoder",
    "GaussianAutoencoder",
    "IdentityAutoencoder",
    "KLAutoencoder",
]
