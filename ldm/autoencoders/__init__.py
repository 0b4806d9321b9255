"""Autoencoders: between images in [-1, 1] and the latents that diffusion works on."""

from ldm.autoencoders.autoencoder import Autoencoder
from ldm.autoencoders.decoder import Decoder
from ldm.autoencoders.encoder import Encoder
from ldm.autoencoders.gaussian import DiagonalGaussian, GaussianAutoencoder
from ldm.autoencoders.identity import IdentityAutoencoder
from ldm.autoencoders.kl import KLAutoencoder
from ldm.autoencoders.precision import decode_safely, encode_safely
from ldm.autoencoders.quantizer import Quantized, VectorQuantizer
from ldm.autoencoders.tiling import decode_tiled, encode_tiled
from ldm.autoencoders.vq import VQAutoencoder

__all__ = [
    "Autoencoder",
    "Decoder",
    "DiagonalGaussian",
    "Encoder",
    "GaussianAutoencoder",
    "IdentityAutoencoder",
    "KLAutoencoder",
    "Quantized",
    "VQAutoencoder",
    "VectorQuantizer",
    "decode_safely",
    "decode_tiled",
    "encode_safely",
    "encode_tiled",
]
