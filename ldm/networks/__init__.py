"""Networks: what maps a noisy sample, a time and conditions to a prediction, and what judges images."""

from ldm.networks.adm import ADMUNet
from ldm.networks.digit_classifier import DigitClassifier, DigitPrediction
from ldm.networks.discriminator import PatchDiscriminator
from ldm.networks.dit import DiT
from ldm.networks.edm2_unet import EDM2UNet
from ldm.networks.edm_unet import EDMUNet
from ldm.networks.micro_dit import MicroDiT
from ldm.networks.mmdit import MMDiT
from ldm.networks.noisy_classifier import NoisyClassifier
from ldm.networks.unet import UNet

__all__ = [
    "ADMUNet",
    "DiT",
    "DigitClassifier",
    "DigitPrediction",
    "EDM2UNet",
    "EDMUNet",
    "MMDiT",
    "MicroDiT",
    "NoisyClassifier",
    "PatchDiscriminator",
    "UNet",
]
