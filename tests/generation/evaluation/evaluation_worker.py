"""Evaluates a sampler that any process can have, slowly: what a test kills, and starts several times."""

import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from ldm.generation.evaluation.evaluate import Evaluation, Subject
from ldm.generation.evaluation.workers import FreeWorkers
from ldm.metrics import CLIPScore, FrechetDistance, InceptionScore, KernelDistance, PrecisionRecall

NUM_SAMPLES, SHARD = 64, 8


class Judge(nn.Module):
    """Random projections of an image, and of the letters of a text."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.register_buffer("matrix", torch.randn(3 * 8 * 8, self.num_features, generator=random))

    def forward(self, images):
        return images.double().flatten(1) @ self.matrix.double()

    embed_images = forward

    def describe(self):
        return {"network": "Judge"}

    def embed_texts(self, texts):
        return torch.tensor([[text.count(letter) for letter in "pictur"] for text in texts]).double()


def draw(prompts, seeds):
    """Noise around a level that the prompt's number gives."""
    time.sleep(0.05)
    levels = [int(prompt.split()[-1]) for prompt in prompts]
    noise = [np.random.default_rng(seed).integers(-40, 41, (8, 8, 3)) for seed in seeds]
    return [
        Image.fromarray((40 * level + 60 + part).clip(0, 255).astype(np.uint8))
        for level, part in zip(levels, noise, strict=True)
    ]


def evaluate(folder: Path, reference: Path, *, batch_size: int = 4, **options) -> dict[str, float]:
    judge = Judge()
    evaluation = Evaluation(
        metrics={
            "fid": FrechetDistance(judge),
            "kid": KernelDistance(judge, num_subsets=5, subset_size=20),
            "inception_score": InceptionScore(judge, splits=3),
            "precision_recall": PrecisionRecall(judge),
            "clip_score": CLIPScore(judge),
        },
        prompts=[{"prompt": f"picture {i}"} for i in range(4)],
        reference=reference,
        num_samples=NUM_SAMPLES,
        batch_size=batch_size,
        **({"shard_size": SHARD, "feature_batch_size": 5, "reference_cache": folder / "reference"} | options),
    )
    subject = Subject(folder, torch.device("cpu"), {"weights_sha256": "0"}, FreeWorkers())
    return evaluation.of_samples(draw, subject)
