"""Conditions and seeds to images."""

from ldm.generation.noise import SeededNoise
from ldm.generation.postprocess import grid, to_pil
from ldm.generation.text_to_image import SamplingSettings, TextToImage

__all__ = ["SamplingSettings", "SeededNoise", "TextToImage", "grid", "to_pil"]
