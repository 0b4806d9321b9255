"""Tiny judges, images and a table of all metrics, for tests that every metric has to pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.metrics import (
    ClassAccuracy,
    CLIPDiscrepancy,
    CLIPScore,
    CodebookUsage,
    DensityCoverage,
    FrechetDistance,
    FrechetInfinity,
    InceptionScore,
    KernelDistance,
    PairwiseDiversity,
    PerceptualDistance,
    PrecisionRecall,
    ReconstructionQuality,
)

NUM_IMAGES = 100
SIDE = 12


class Pixels(nn.Module):
    """A few pixels as features, in float64 so that a batch does not change the rounding."""

    def __init__(self, num_features: int = 4) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, images):
        return images.double().flatten(1)[:, : self.num_features]


class Words(Pixels):
    """A CLIP of its own kind: an image is its first four pixels, a text the letters a to d that it holds."""

    def embed_images(self, images):
        return nn.functional.normalize(self(images), dim=1)

    def embed_texts(self, texts):
        letters = torch.tensor([[text.count(letter) for letter in "abcd"] for text in texts]).double()
        return nn.functional.normalize(letters, dim=1)


class SquaredError(nn.Module):
    """A stand-in for LPIPS: mean squared error."""

    def embed(self, images):
        return [images.double()]

    def between(self, activations, others):
        return (activations[0] - others[0]).square().flatten(1).mean(dim=1)

    def forward(self, images, others):
        return self.between(self.embed(images), self.embed(others))


def images(count: int = NUM_IMAGES, seed: int = 0, side: int = SIDE) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def feed_two_sets(metric, places: torch.Tensor) -> None:
    metric.update(images(seed=0)[places], real=True)
    metric.update(images(seed=1)[places] * 0.8, real=False)


def feed_numbered_sets(metric, places: torch.Tensor) -> None:
    metric.update(images(seed=0)[places], index=places, real=True)
    metric.update(images(seed=1)[places] * 0.8, index=places, real=False)


def feed_numbered(metric, places: torch.Tensor) -> None:
    metric.update(images(seed=1)[places], places)


def feed_labels(metric, places: torch.Tensor) -> None:
    metric.update(images(seed=1)[places], places % 4)


def feed_prompts(metric, places: torch.Tensor) -> None:
    metric.update(images(seed=1)[places], ["abcd"[place % 4] + "bad" for place in places.tolist()])


def feed_pairs(metric, places: torch.Tensor) -> None:
    metric.update(images(seed=1)[places], images(seed=0)[places])


def feed_codes(metric, places: torch.Tensor) -> None:
    codes = torch.randint(0, 40, (NUM_IMAGES, 4, 4), generator=torch.Generator().manual_seed(0))
    metric.update(codes[places])


def feed_prompt_by_prompt(metric, places: torch.Tensor) -> None:
    for place in places.tolist():
        metric.update(images(3, seed=place))


# Every metric with how it sees the images at some places of the evaluated set.
METRICS: dict[str, tuple[Callable[[], Any], Callable[[Any, torch.Tensor], None]]] = {
    "fid": (lambda: FrechetDistance(Pixels()), feed_two_sets),
    "fid_infinity": (lambda: FrechetInfinity(Pixels(), num_points=4, smallest=30), feed_numbered_sets),
    "kid": (lambda: KernelDistance(Pixels(), num_subsets=5, subset_size=40), feed_numbered_sets),
    "kid_of_few": (lambda: KernelDistance(Pixels(), num_subsets=5, subset_size=9, max_images=11), feed_numbered_sets),
    "cmmd": (lambda: CLIPDiscrepancy(Pixels()), feed_numbered_sets),
    "precision_recall": (lambda: PrecisionRecall(Pixels(), chunk_size=32), feed_numbered_sets),
    "density_coverage": (lambda: DensityCoverage(Pixels(), chunk_size=32), feed_numbered_sets),
    "inception_score": (lambda: InceptionScore(Pixels(), splits=3), feed_numbered),
    "class_accuracy": (lambda: ClassAccuracy(Pixels()), feed_labels),
    "clip_score": (lambda: CLIPScore(Words()), feed_prompts),
    "lpips": (lambda: PerceptualDistance(SquaredError()), feed_pairs),
    "reconstruction": (ReconstructionQuality, feed_pairs),
    "codebook_usage": (lambda: CodebookUsage(64), feed_codes),
    "pairwise_diversity": (lambda: PairwiseDiversity(SquaredError()), feed_prompt_by_prompt),
}


def values(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """A metric's value or values, in a fixed order, after it has seen the images at each part's places."""
    build, feed = METRICS[name]
    metric = build()
    for part in parts:
        feed(metric, part)
    result = metric.compute()
    if isinstance(result, dict):
        result = tuple(result.values())
    return torch.stack(result) if isinstance(result, tuple) else result[None]


def random_inception(path: Path, outputs: tuple[str, ...] = ("2048",)):
    """Torch-fidelity's network with random weights, saved to path: it can only be built from a file."""
    from torch_fidelity import feature_extractor_inceptionv3

    torch.manual_seed(0)
    build = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    original = build.load_state_dict
    try:
        build.load_state_dict = lambda self, state: None
        torch.save({}, path)
        network = build("inception-v3-compat", list(outputs), str(path))
    finally:
        build.load_state_dict = original
    torch.save(network.state_dict(), path)
    return network
