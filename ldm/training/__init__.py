"""Lightning modules and callbacks."""

from ldm.training.autoencoder import AutoencoderModule
from ldm.training.classifier import DigitClassifierModule
from ldm.training.latent_diffusion import LatentDiffusionModule
from ldm.training.noisy_classifier import NoisyClassifierModule

__all__ = ["AutoencoderModule", "DigitClassifierModule", "LatentDiffusionModule", "NoisyClassifierModule"]
