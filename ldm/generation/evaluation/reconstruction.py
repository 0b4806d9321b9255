"""How well an autoencoder gives images back: its reconstructions are measured beside their originals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from ldm.autoencoders import Autoencoder, VQAutoencoder
from ldm.generation.encode import weights_sha256
from ldm.generation.evaluation.evaluate import Evaluation, Subject
from ldm.generation.evaluation.images import Images
from ldm.generation.postprocess import to_pil
from ldm.metrics import CodebookUsage


class CodesOfImages(CodebookUsage):
    """Codebook usage of real images under an autoencoder with a codebook."""

    def __init__(self, autoencoder: VQAutoencoder) -> None:
        super().__init__(autoencoder.quantize.num_codes)
        self.autoencoder = autoencoder

    def update(self, images: Tensor, real: bool) -> None:  # type: ignore[override]
        """Counts the codes of real images (B, 3, H, W) in [-1, 1]; reconstructions are passed over."""
        if real:
            super().update(self.autoencoder.codes(self.autoencoder.encode(images)))


def with_codes(metrics: dict[str, Any], autoencoder: Autoencoder) -> dict[str, Any]:
    """Metrics in which the usage of a codebook is that of this autoencoder.

    Raises:
        ValueError: it has no codebook.
    """
    found = {}
    for name, metric in metrics.items():
        if isinstance(metric, CodebookUsage) and not isinstance(autoencoder, VQAutoencoder):
            raise ValueError(
                f"{name}: got a {type(autoencoder).__name__}, expected one with a codebook; leave {name} out"
            )
        found[name] = CodesOfImages(autoencoder) if isinstance(metric, CodebookUsage) else metric  # type: ignore[arg-type]
    return found


def evaluate_reconstructions(
    evaluation: Evaluation, autoencoder: Autoencoder, subject: Subject, *, batch_size: int
) -> dict[str, float]:
    """Reconstructs every image of the evaluation's reference from its mean latents and measures the results.

    Raises:
        ValueError: there is no reference, or its images are of several sizes.
    """
    originals = evaluation.originals()
    evaluation.prompts, evaluation.num_samples, evaluation.seed = [{"prompt": ""}], len(originals), 0
    evaluation.prompts_source = "none: reconstructions of the reference"
    evaluation.batch_size = batch_size
    about = {"weights_sha256": weights_sha256(autoencoder), "reconstructs": originals.describe(), **subject.about}

    @torch.no_grad()
    def draw(prompts: Sequence[str], numbers: Sequence[int]) -> list[Image]:
        return to_pil(reconstruct(autoencoder, _batch(originals, numbers).to(subject.device)))

    return evaluation.of_samples(draw, Subject(subject.folder, subject.device, about, subject.workers))


def reconstruct(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as they come back from the mean of their latents."""
    return autoencoder.decode(autoencoder.to_latents(autoencoder.encode(images), noise=None))


def _batch(images: Images, numbers: Sequence[int]) -> Tensor:
    levels = [images[number]["image"] for number in numbers]
    sizes = sorted({(picture.shape[2], picture.shape[1]) for picture in levels})
    if len(sizes) > 1:
        told = " and ".join(f"{width}x{height}" for width, height in sizes[:2])
        raise ValueError(
            f"reference: got images of {told} pixels to reconstruct, expected one size; set resolution=256"
        )
    return torch.stack(levels).float() / 127.5 - 1
