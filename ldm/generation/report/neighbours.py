"""The real images that generated ones are nearest to: what a model has learned by heart shows here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ldm.generation.report.reading import EvaluationFolder, picture_of

if TYPE_CHECKING:
    from ldm.generation.evaluation.images import Images

# Samples and real images whose distances are held at once.
BLOCK = 1024
# Candidates beyond those that are wanted.
SPARE = 8


@dataclass(frozen=True)
class Nearest:
    """For each sample its nearest real images, the nearest first.

    Args:
        network: whose features were compared.
        samples: (Q,) their indices.
        numbers: (Q, k) of the real images.
        distances: (Q, k), Euclidean.
        num_real: how many were searched.
    """

    network: str
    samples: np.ndarray
    numbers: np.ndarray
    distances: np.ndarray
    num_real: int


def nearest_real(evaluation: EvaluationFolder, *, k: int = 4, num_samples: int = 2000) -> Nearest | None:
    """The nearest real images of at most `num_samples` samples, evenly spread, in a metric's own feature space.

    The space is the first one in which the features of both were kept; None where there is none.
    """
    for key, description, features in evaluation.features():
        real = evaluation.reference_features(key)
        if real is None or real.shape[1:] != features.shape[1:]:
            continue
        chosen = np.arange(len(features))[:: max(1, -(-len(features) // num_samples))]
        distances, numbers = search(features[chosen], real, k=min(k, len(real)))
        name = str(description.get("network") or key).rpartition(".")[2]
        return Nearest(name, chosen, numbers, distances, len(real))
    return None


def nearest_trained(evaluation: EvaluationFolder, *, k: int = 4, num_samples: int = 2000) -> Nearest | None:
    """As `nearest_real`, among the images that the model was trained on; None where no features of them were kept."""
    trained = evaluation.training_features()
    for key, description, features in evaluation.features():
        if trained is not None and key == evaluation.training["network"]:
            chosen = np.arange(len(features))[:: max(1, -(-len(features) // num_samples))]
            distances, rows = search(features[chosen], trained, k=min(k, len(trained)))
            name = str(description.get("network") or key).rpartition(".")[2]
            return Nearest(name, chosen, rows * int(evaluation.training["every"]), distances, len(trained))
    return None


def nearest_pixels(
    evaluation: EvaluationFolder, images: Images, *, k: int = 4, num_samples: int = 500, num_real: int = 50_000
) -> Nearest:
    """The nearest of these images to some samples by their pixels at 16 x 16, evenly spread.

    Args:
        num_samples, num_real: how many are looked at, at most.
    """
    numbers = np.arange(len(images))[:: max(1, -(-len(images) // num_real))]
    real = np.stack([pixels(picture_of(images[number])) for number in numbers.tolist()])
    chosen = np.arange(len(evaluation))[:: max(1, -(-len(evaluation) // num_samples))]
    queries = np.stack([pixels(evaluation.picture(index)) for index in chosen.tolist()])
    distances, rows = search(queries, real, k=min(k, len(real)))
    return Nearest("pixels at 16 x 16", chosen, numbers[rows], distances, len(real))


def pixels(picture: Image.Image) -> np.ndarray:
    """A picture as 16 x 16 pixels of three colours, float32 (768,) in [0, 1]."""
    small = picture.convert("RGB").resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(-1) / 255


def search(queries: np.ndarray, real: np.ndarray, *, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(distances (Q, k), numbers (Q, k)) of the k nearest rows of real (M, D) to queries (Q, D), in bounded memory.

    Products in float32 choose SPARE more than k, which are then compared exactly: the expansion of the square loses
    digits where two are alike, which is where they matter.
    """
    centre = real[:: max(1, len(real) // BLOCK)].mean(0, dtype=np.float64).astype(np.float32)
    count = min(k + SPARE, len(real))
    found = []
    for start in range(0, len(queries), BLOCK):
        part = queries[start : start + BLOCK].astype(np.float32) - centre
        best, numbers = np.empty((len(part), 0), np.float32), np.empty((len(part), 0), np.int64)
        for first in range(0, len(real), BLOCK):
            other = real[first : first + BLOCK].astype(np.float32) - centre
            # Without the query's own square, which is the same for all.
            squares = np.einsum("ij,ij->i", other, other) - 2 * (part @ other.T)
            joined = np.concatenate([best, squares], axis=1)
            names = np.concatenate([numbers, np.broadcast_to(first + np.arange(len(other)), squares.shape)], axis=1)
            least = np.argpartition(joined, min(count, joined.shape[1]) - 1, axis=1)[:, :count]
            best, numbers = np.take_along_axis(joined, least, 1), np.take_along_axis(names, least, 1)
        found.append(_ordered(queries[start : start + BLOCK], real, np.sort(numbers, axis=1), k))
    return np.concatenate([distances for distances, _ in found]), np.concatenate([numbers for _, numbers in found])


def _ordered(queries: np.ndarray, real: np.ndarray, numbers: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of these candidates (Q, C), by distances in float64; of equal ones the lower number first."""
    distances = np.stack(
        [
            np.linalg.norm(real[row].astype(np.float64) - query, axis=1)
            for query, row in zip(queries, numbers, strict=True)
        ]
    )
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(numbers, order, 1)


def rows_to_show(nearest: Nearest, count: int) -> tuple[Sequence[int], Sequence[int]]:
    """(rows of the samples that are nearest to a real image, rows evenly spread over all samples), `count` of each."""
    closest = np.argsort(nearest.distances[:, 0], kind="stable")[:count].tolist()
    step = max(1, len(nearest.samples) // count)
    return closest, list(range(0, len(nearest.samples), step))[:count]
