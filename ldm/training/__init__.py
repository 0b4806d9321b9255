"""Lightning modules and callbacks."""

from ldm.training.autoencoder import AutoencoderModule
from ldm.training.classifier import DigitClassifierModule
from ldm.training.latent_diffusion import LatentDiffusionModule

__all__ = ["AutoencoderModule", "DigitClassifierModule", "LatentDiffusionModule"]
