"""Conditions and seeds to images."""

from ldm.generation.image_to_image import ImageToImage
from ldm.generation.inpaint import Inpaint
from ldm.generation.interpolate import Interpolate
from ldm.generation.memory import Memory
from ldm.generation.noise import SeededNoise
from ldm.generation.outpaint import Outpaint
from ldm.generation.pipeline import Pipeline, SamplingSettings
from ldm.generation.postprocess import grid, to_pil
from ldm.generation.task import Order, Start, Task
from ldm.generation.text_to_image import TextToImage
from ldm.generation.two_pass import TwoPass
from ldm.generation.upscale import Upscale
from ldm.generation.variations import Variations

__all__ = [
    "ImageToImage",
    "Inpaint",
    "Interpolate",
    "Memory",
    "Order",
    "Outpaint",
    "Pipeline",
    "SamplingSettings",
    "SeededNoise",
    "Start",
    "Task",
    "TextToImage",
    "TwoPass",
    "Upscale",
    "Variations",
    "grid",
    "to_pil",
]
