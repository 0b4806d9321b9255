"""Callbacks: what is shown, measured and pictured while a model trains."""

from ldm.training.callbacks.gradient_norm import GradientNorm
from ldm.training.callbacks.progress import Progress
from ldm.training.callbacks.reconstruction_grid import ReconstructionGrid
from ldm.training.callbacks.sample_grid import SampleGrid
from ldm.training.callbacks.sample_metrics import SampleMetrics
from ldm.training.callbacks.throughput import Throughput

__all__ = ["GradientNorm", "Progress", "ReconstructionGrid", "SampleGrid", "SampleMetrics", "Throughput"]
