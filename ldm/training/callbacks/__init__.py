"""Callbacks: what is shown, measured and pictured while a model trains, and what keeps it from going wrong."""

from ldm.training.callbacks.by_figure import BestCheckpoint, StopEarly
from ldm.training.callbacks.gradient_norm import GradientNorm
from ldm.training.callbacks.post_hoc_ema import PostHocEMA
from ldm.training.callbacks.preemption import StopOnSignal
from ldm.training.callbacks.progress import Progress
from ldm.training.callbacks.reconstruction_grid import ReconstructionGrid
from ldm.training.callbacks.sample_grid import SampleGrid
from ldm.training.callbacks.sample_metrics import SampleMetrics
from ldm.training.callbacks.self_check import SelfCheck
from ldm.training.callbacks.spike_guard import SpikeGuard
from ldm.training.callbacks.throughput import Throughput
from ldm.training.callbacks.watchdog import Watchdog

__all__ = [
    "BestCheckpoint",
    "GradientNorm",
    "PostHocEMA",
    "Progress",
    "ReconstructionGrid",
    "SampleGrid",
    "SampleMetrics",
    "SelfCheck",
    "SpikeGuard",
    "StopEarly",
    "StopOnSignal",
    "Throughput",
    "Watchdog",
]
