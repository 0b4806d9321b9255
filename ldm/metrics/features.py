"""Feature networks of the metrics, and the one place where images become the numbers that a PNG would hold.

A feature network is an `nn.Module` with an attribute `num_features` that maps images (B, 3, H, W) in [-1, 1] to
(B, num_features). Metrics hand it images that went through `quantize` first.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

INCEPTION_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
INCEPTION_OUTPUTS = {"64": 64, "192": 192, "768": 768, "2048": 2048, "logits_unbiased": 1008, "logits": 1008}
INCEPTION_SOURCE = (
    f"{INCEPTION_FILES[0]} (release fid_weights of github.com/mseitzer/pytorch-fid) or "
    f"{INCEPTION_FILES[1]} (release v0.2.0 of github.com/toshas/torch-fidelity)"
)


def quantize(images: Tensor) -> Tensor:
    """Images in [-1, 1] as the uint8 levels of their PNG: clamped, then rounded; same shape.

    Casting without the clamp would wrap -1.01 round to 254, without the rounding it would darken every image.
    """
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def as_seen(images: Tensor) -> Tensor:
    """Images in [-1, 1] as they come back from their PNG, float32 in [-1, 1]."""
    return quantize(images).float() / 127.5 - 1


def num_features_of(network: nn.Module) -> int:
    """The size of a network's features; raises ValueError where the network does not say."""
    size = getattr(network, "num_features", None)
    if not isinstance(size, int):
        raise ValueError(
            f"got {type(network).__name__} as feature network, expected an nn.Module with an integer `num_features`; "
            "give it that attribute"
        )
    return size


class ClassifierFeatures(nn.Module):
    """One output of a classifier as features, e.g. "features" or "digit" of `ldm.networks.DigitClassifier`.

    Args:
        classifier: maps images (B, 3, H, W) in [-1, 1] to an object with tensors (B, D) as attributes.
        output: the attribute to take.
        num_features: its size D.
    """

    def __init__(self, classifier: nn.Module, *, output: str = "features", num_features: int = 64) -> None:
        super().__init__()
        self.classifier = classifier
        self.output = output
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, 3, H, W) in [-1, 1]."""
        features: Tensor = getattr(self.classifier(images), self.output)
        return features


class InceptionFeatures(nn.Module):
    """The Inception-v3 of published FIDs and Inception Scores: TensorFlow's 2015-12-05 weights and resizing.

    Args:
        weights_path: the weights file. None looks for it in torch.hub's cache; nothing is ever downloaded.
        output: "2048" for the Fréchet distance, "logits_unbiased" for the Inception Score.

    Raises:
        FileNotFoundError: no weights; the message names file, source and option.
        ValueError: an output that this network does not have.
        ModuleNotFoundError: torch-fidelity is not installed.

    Source: Szegedy et al. 2016; port by Obukhov et al., torch-fidelity.
    """

    def __init__(self, weights_path: Path | str | None = None, *, output: str = "2048") -> None:
        super().__init__()
        if output not in INCEPTION_OUTPUTS:
            raise ValueError(f"got output={output!r}, expected one of {list(INCEPTION_OUTPUTS)}")
        path = find_inception_weights(weights_path)
        # torch-fidelity unpickles whatever it is given; this read refuses anything but tensors before it may.
        torch.load(path, map_location="cpu", weights_only=True)
        self.network = _inception(output, path)
        self.num_features = INCEPTION_OUTPUTS[output]

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, num_features) of images (B, 3, H, W) in [-1, 1], of any size."""
        features: Tensor = self.network(quantize(images))[0]
        return features


def _inception(output: str, path: Path) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "got no torch-fidelity, expected it for Inception; pip install torch-fidelity"
        ) from error
    return FeatureExtractorInceptionV3("inception-v3-compat", [output], str(path))


def find_inception_weights(weights_path: Path | str | None) -> Path:
    """The file at `weights_path`, or, when None, in torch.hub's cache; raises FileNotFoundError otherwise."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    candidates = [cache / name for name in INCEPTION_FILES] if weights_path is None else [Path(weights_path)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"got no Inception weights at {candidates[0]}, expected {INCEPTION_SOURCE}; "
        "fetch one and give its place as weights_path"
    )
