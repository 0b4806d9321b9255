"""Networks: what maps a noisy sample, a time and conditions to a prediction, and what judges images."""

from ldm.networks.digit_classifier import DigitClassifier, DigitPrediction
from ldm.networks.discriminator import PatchDiscriminator
from ldm.networks.unet import UNet

__all__ = ["DigitClassifier", "DigitPrediction", "PatchDiscriminator", "UNet"]
