"""Prompts to pictures, from noise alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ldm.generation.task import Order, Start, Task

if TYPE_CHECKING:
    from ldm.generation.pipeline import Pipeline, SamplingSettings


class TextToImage(Task):
    """Samples from noise, under a prompt."""

    def start(self, pipeline: Pipeline, orders: Sequence[Order], settings: SamplingSettings) -> Start:
        pipeline.require_plain()
        times = pipeline.times(settings)
        noise = pipeline.noise(orders, settings.size)
        cond, uncond = pipeline.conditions(orders, settings.size)
        x = noise() * pipeline.denoiser.schedule.prior_std(times[0])
        return Start(x, times, cond, uncond, noise)
