"""The mathematics of diffusion, shared by training and sampling. Time t = 0 is data; noise grows with t."""

from ldm.diffusion.conditioning import Conditioning
from ldm.diffusion.denoiser import Answer, Denoiser, Prediction, PredictionWithVariance
from ldm.diffusion.guidance import Autoguidance, ClassifierGuidance, Denoise, Guidance
from ldm.diffusion.schedules import Schedule

__all__ = [
    "Answer",
    "Autoguidance",
    "ClassifierGuidance",
    "Conditioning",
    "Denoise",
    "Denoiser",
    "Guidance",
    "Prediction",
    "PredictionWithVariance",
    "Schedule",
]
