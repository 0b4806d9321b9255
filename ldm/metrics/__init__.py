"""Metrics: each a `torchmetrics.Metric` with float64 sums that add up exactly across ranks."""

from ldm.metrics.class_accuracy import ClassAccuracy
from ldm.metrics.clip import OpenCLIPFeatures, TransformersCLIPFeatures
from ldm.metrics.clip_score import CLIPScore
from ldm.metrics.cmmd import CLIPDiscrepancy
from ldm.metrics.codebook_usage import CodebookUsage
from ldm.metrics.density_coverage import DensityCoverage
from ldm.metrics.digits import DigitReport
from ldm.metrics.extraction import extract, feed, figures, network_key, network_of, share_networks
from ldm.metrics.features import ClassifierFeatures, as_seen, describe_metric, describe_network, quantize
from ldm.metrics.fid import FrechetDistance, frechet_distance
from ldm.metrics.fid_infinity import FrechetInfinity
from ldm.metrics.inception import InceptionFeatures
from ldm.metrics.inception_score import InceptionScore
from ldm.metrics.kid import KernelDistance
from ldm.metrics.lpips import LPIPS
from ldm.metrics.pairwise_diversity import PairwiseDiversity
from ldm.metrics.perceptual_distance import PerceptualDistance
from ldm.metrics.precision_recall import PrecisionRecall
from ldm.metrics.preprocessing import JPEGFeatures
from ldm.metrics.random_features import RandomFeatures
from ldm.metrics.reconstruction import ReconstructionQuality
from ldm.metrics.statistics import Statistics
from ldm.metrics.vision_features import DINOv2Features, TorchvisionFeatures

__all__ = [
    "LPIPS",
    "CLIPDiscrepancy",
    "CLIPScore",
    "ClassAccuracy",
    "ClassifierFeatures",
    "CodebookUsage",
    "DINOv2Features",
    "DensityCoverage",
    "DigitReport",
    "FrechetDistance",
    "FrechetInfinity",
    "InceptionFeatures",
    "InceptionScore",
    "JPEGFeatures",
    "KernelDistance",
    "OpenCLIPFeatures",
    "PairwiseDiversity",
    "PerceptualDistance",
    "PrecisionRecall",
    "RandomFeatures",
    "ReconstructionQuality",
    "Statistics",
    "TorchvisionFeatures",
    "TransformersCLIPFeatures",
    "as_seen",
    "describe_metric",
    "describe_network",
    "extract",
    "feed",
    "figures",
    "frechet_distance",
    "network_key",
    "network_of",
    "quantize",
    "share_networks",
]
