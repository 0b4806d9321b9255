"""Conditions and seeds to images."""

from ldm.generation.noise import SeededNoise
from ldm.generation.pipeline import Pipeline, SamplingSettings
from ldm.generation.postprocess import grid, to_pil

__all__ = ["Pipeline", "SamplingSettings", "SeededNoise", "grid", "to_pil"]
