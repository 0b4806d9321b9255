"""Metrics: each a `torchmetrics.Metric` with float64 sums that add up exactly across ranks."""

from ldm.metrics.codebook_usage import CodebookUsage
from ldm.metrics.digits import DigitReport
from ldm.metrics.features import ClassifierFeatures, InceptionFeatures, as_seen, quantize
from ldm.metrics.fid import FrechetDistance, frechet_distance
from ldm.metrics.inception_score import InceptionScore

__all__ = [
    "ClassifierFeatures",
    "CodebookUsage",
    "DigitReport",
    "FrechetDistance",
    "InceptionFeatures",
    "InceptionScore",
    "as_seen",
    "frechet_distance",
    "quantize",
]
