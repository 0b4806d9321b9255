"""What the digits experiments are judged by: right digit, ink and paper, and as much variety as real scans have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ldm.metrics.features import as_seen, describe_network, num_features_of
from ldm.metrics.fid import frechet_distance, gaussian
from ldm.metrics.inception_score import inception_score
from ldm.metrics.statistics import Statistics

# Rows of the sums: generated images, and real ones in two halves, so that real can be compared with real.
GENERATED, FIRST_HALF, SECOND_HALF = range(3)
REAL = [FIRST_HALF, SECOND_HALF]


class DigitReport(Metric):
    """Accuracy, diversity, Fréchet distance and inception score of generated digits beside those of real ones.

    *Diversity* is the root mean square distance of an image's features from the mean of its digit, averaged over the
    digits (unbiased). Only images whose digit the judge names right count, generated and real alike: otherwise a
    wrong digit, far from all others, would pass as variety. Renderings count one by one, although those of one scan are
    alike: with some 36 scans a digit that puts the real value about one per cent low.

    The real images are split in two halves by scan: the Fréchet distance between the halves says what a perfect
    generator would get from as few images. All sums are float64 and add up across ranks.

    Args:
        classifier: the judge, e.g. `ldm.networks.DigitClassifier`: maps images to an object with logits `digit`,
            `ink`, `paper` and with `features`; has `num_features`.
        num_digits: number of digit classes.
    """

    is_differentiable = False
    full_state_update = False

    counts: Tensor
    sums: Tensor
    outers: Tensor
    spread_counts: Tensor
    spread_sums: Tensor
    spread_squares: Tensor
    probabilities: Tensor
    negative_entropies: Tensor
    hits: Tensor
    trials: Tensor

    # Columns of hits and trials.
    READINGS = ("digit_seen", "digit_held_out", "ink", "paper")

    def __init__(self, classifier: nn.Module, *, num_digits: int = 10) -> None:
        super().__init__()
        size = num_features_of(classifier)
        self.classifier = classifier.eval()
        self._add_sums("counts", 3)
        self._add_sums("sums", 3, size)
        self._add_sums("outers", 3, size, size)
        self._add_sums("spread_counts", 3, num_digits)
        self._add_sums("spread_sums", 3, num_digits, size)
        self._add_sums("spread_squares", 3, num_digits)
        self._add_sums("probabilities", 3, num_digits)
        self._add_sums("negative_entropies", 3)
        self._add_sums("hits", 3, len(self.READINGS))
        self._add_sums("trials", 3, len(self.READINGS))

    def _add_sums(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, labels: Mapping[str, Any], real: bool) -> None:
        """Adds images (B, 3, 32, 32) in [-1, 1] with labels (B,) "digit", "ink", "paper" and "held_out" (0 or 1).

        Real images also need "scan", the number of the scan behind each rendering.
        """
        prediction = self.classifier(as_seen(images))
        labels = {
            name: torch.as_tensor(value, device=images.device) for name, value in labels.items() if name in _LABELS
        }
        rows = FIRST_HALF + half_of(labels["scan"]) if real else torch.full_like(labels["digit"], GENERATED)
        features, logits = prediction.features.double(), prediction.digit.double()
        right = logits.argmax(dim=1) == labels["digit"]
        for row in REAL if real else [GENERATED]:
            chosen = rows == row
            self._add_distribution(row, features[chosen], logits[chosen].softmax(dim=1))
            self._add_spread(row, features[chosen & right], labels["digit"][chosen & right])
        self._add_hits(rows, right, prediction, labels)

    def describe(self) -> dict[str, Any]:
        """What goes into the protocol."""
        return {"metric": type(self).__name__, "classifier": describe_network(self.classifier)}

    def compute(self) -> dict[str, float]:
        """The report; a value is NaN where no image speaks to it.

        `digit_accuracy_seen`, `digit_accuracy_held_out`, `ink_accuracy`, `paper_accuracy`, `diversity`,
        `frechet_distance`, `inception_score` and `num_images` for generated images, the same under `real/` for real
        ones (there the Fréchet distance is the one between two halves), and `diversity_ratio`.
        """
        report = {**self._side([GENERATED]), **{f"real/{name}": value for name, value in self._side(REAL).items()}}
        report["diversity_ratio"] = report["diversity"] / report["real/diversity"]
        report["frechet_distance"] = self._distance([GENERATED], REAL)
        report["real/frechet_distance"] = self._distance([FIRST_HALF], [SECOND_HALF])
        return report

    def _add_distribution(self, row: int, features: Tensor, probabilities: Tensor) -> None:
        self.counts[row] += len(features)
        self.sums[row] += features.sum(dim=0)
        self.outers[row] += features.T @ features
        self.probabilities[row] += probabilities.sum(dim=0)
        self.negative_entropies[row] += torch.special.xlogy(probabilities, probabilities).sum()

    def _add_spread(self, row: int, features: Tensor, digit: Tensor) -> None:
        self.spread_counts[row].index_add_(0, digit, torch.ones_like(features[:, 0]))
        self.spread_sums[row].index_add_(0, digit, features)
        self.spread_squares[row].index_add_(0, digit, features.square().sum(dim=1))

    def _add_hits(self, rows: Tensor, right: Tensor, prediction: Any, labels: Mapping[str, Tensor]) -> None:
        held_out = labels["held_out"].bool()
        ink = prediction.ink.argmax(dim=1) == labels["ink"]
        paper = prediction.paper.argmax(dim=1) == labels["paper"]
        always = torch.ones_like(held_out)
        trials = torch.stack([~held_out, held_out, always, always], dim=1)
        hits = torch.stack([right, right, ink, paper], dim=1) & trials
        self.trials.index_add_(0, rows, trials.double())
        self.hits.index_add_(0, rows, hits.double())

    def _side(self, rows: list[int]) -> dict[str, float]:
        accuracy = (self.hits[rows].sum(dim=0) / self.trials[rows].sum(dim=0)).tolist()
        score = inception_score(
            self.probabilities[rows].sum(dim=0), self.negative_entropies[rows].sum(), self.counts[rows].sum()
        )
        return {
            "digit_accuracy_seen": accuracy[0],
            "digit_accuracy_held_out": accuracy[1],
            "ink_accuracy": accuracy[2],
            "paper_accuracy": accuracy[3],
            "diversity": self._diversity(rows),
            "inception_score": score.item(),
            "num_images": self.counts[rows].sum().item(),
        }

    def _diversity(self, rows: list[int]) -> float:
        count = self.spread_counts[rows].sum(dim=0)
        mean_square = self.spread_sums[rows].sum(dim=0).square().sum(dim=1) / count
        variance = (self.spread_squares[rows].sum(dim=0) - mean_square) / (count - 1)
        # A digit with fewer than two right images has no spread to speak of and is left out.
        return variance[count > 1].clamp_min(0).sqrt().mean().item()

    def _distance(self, rows: list[int], others: list[int]) -> float:
        if min(self.counts[rows].sum(), self.counts[others].sum()) < 2:
            return float("nan")
        one, other = (
            Statistics(*gaussian(self.sums[side].sum(dim=0), self.outers[side].sum(dim=0), self.counts[side].sum()))
            for side in (rows, others)
        )
        return frechet_distance(one, other).item()


def half_of(scan: Tensor) -> Tensor:
    """The half, 0 or 1, that each scan (B,) belongs to.

    Hashed (Knuth's multiplicative hash), because the scans were taken in runs of 0, 1, ..., 9: parity would put the
    even digits in one half and the odd ones in the other.
    """
    return (scan.long() * 2654435761 >> 15) & 1


_LABELS = ("digit", "ink", "paper", "held_out", "scan")
