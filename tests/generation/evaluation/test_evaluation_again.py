"""An evaluation in the folder of another: what is on disk serves where it is the same, and nowhere else."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_worker import Judge
from PIL import Image
from torchmetrics import Metric

from ldm.files import replacing
from ldm.generation.evaluation.evaluate import Evaluation, Subject
from ldm.generation.evaluation.folder import BULK, remove_remains
from ldm.generation.evaluation.workers import FreeWorkers
from ldm.metrics import (
    ClassAccuracy,
    DigitReport,
    FrechetDistance,
    PerceptualDistance,
    RandomFeatures,
    ReconstructionQuality,
)
from ldm.networks import DigitClassifier


def write(folder: Path, *, count: int = 15, seed: int = 0, side: int = 12) -> Path:
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def measure(images: Path, folder: Path, metrics: dict, **options) -> dict[str, float]:
    """The figures of a folder of images."""
    options = {"shard_size": 10, "reference_cache": folder.parent / "cache"} | options
    subject = Subject(folder, torch.device("cpu"), {}, FreeWorkers())
    found = Evaluation(metrics=metrics, **options).of_images(images, subject)
    return {name: value for name, value in found.items() if not name.startswith("seconds")}


class Apart(RandomFeatures):
    """How far apart the features of two pictures are."""

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return (super().forward(images) - super().forward(others)).square().sum(dim=1)


class Labelled(DigitReport):
    """A report on pictures without labels: all are said to be the same."""

    def update(self, images: torch.Tensor, real: bool) -> None:
        names = ("digit", "ink", "paper", "held_out", "scan")
        super().update(images, dict.fromkeys(names, torch.zeros(len(images), dtype=torch.int64)), real)


def test_originals_of_another_folder_are_not_taken_for_the_first_ones(tmp_path: Path) -> None:
    images = write(tmp_path / "images")
    first, second = write(tmp_path / "first", seed=1), write(tmp_path / "second", seed=2)
    figures = [
        measure(images, tmp_path / place, {"quality": ReconstructionQuality()}, reference=real)
        for place, real in (("one", first), ("one", second), ("other", second))
    ]
    assert figures[1] == figures[2] != figures[0]


def test_digits_are_judged_anew_by_another_judge(tmp_path: Path) -> None:
    images = write(tmp_path / "images", side=32)
    judged = []
    for place, seed in (("one", 1), ("one", 2), ("other", 2)):
        torch.manual_seed(seed)
        report = Labelled(DigitClassifier([[0, 0, 0], [255, 255, 255]], width=8, feature_dim=4))
        judged.append(measure(images, tmp_path / place, {"digits": report}, reference=images)["digits/inception_score"])
    assert judged[1] == judged[2] != judged[0]


def test_features_of_parts_of_another_size_are_refused(tmp_path: Path) -> None:
    images, real = write(tmp_path / "images", side=8), write(tmp_path / "real", seed=1, side=8)
    measure(images, tmp_path / "one", {"fid": FrechetDistance(Judge())}, reference=real, shard_size=10)
    with pytest.raises(ValueError, match="an evaluation with shard_size=10, expected 5"):
        measure(images, tmp_path / "one", {"more": FrechetDistance(Judge())}, reference=real, shard_size=5)


def test_what_a_killed_process_had_begun_is_removed_when_all_is_measured(tmp_path: Path) -> None:
    left = []
    for name in BULK:
        with pytest.raises(KeyboardInterrupt), replacing(tmp_path / name / "part" / "00000.npy") as temporary:
            left.append(temporary)
            raise KeyboardInterrupt
    for path in left:  # as a process leaves it that has no time to clean up
        path.write_bytes(b"half")
    remove_remains(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_half_precision_of_the_model_is_not_that_of_its_judges(tmp_path: Path) -> None:
    images, real = write(tmp_path / "images", side=16), write(tmp_path / "real", seed=1, side=16)
    found = []
    for place, is_half in (("half", True), ("whole", False)):
        metrics = {"fid": FrechetDistance(RandomFeatures(8)), "distance": PerceptualDistance(Apart())}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_half):
            found.append(measure(images, tmp_path / place, metrics, reference=real, reference_cache=tmp_path / place))
    assert found[0] == found[1]


class Brightness(Metric):
    """The mean of a power of all levels; it does not describe itself."""

    full_state_update = False
    higher_is_better = True

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: torch.Tensor) -> None:
        self.total += ((images + 1) / 2).double().pow(self.power).sum()

    def compute(self) -> torch.Tensor:
        return self.total


class Classes(torch.nn.Module):
    """The place of the brightest colour; class 2 is never seen."""

    num_features = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images + 1).mean((2, 3)) * torch.tensor([1.0, 1.0, 0.0])


def test_a_metric_without_a_description_is_taken_anew_with_another_setting(tmp_path: Path) -> None:
    images = write(tmp_path / "images")
    places = (("one", 1.0), ("one", 2.0), ("other", 2.0))
    found = [measure(images, tmp_path / place, {"mine": Brightness(power)}) for place, power in places]
    assert found[1] == found[2] != found[0]
    protocol = json.loads((tmp_path / "one" / "evaluation.json").read_text())["metrics"]["mine"]["protocol"]
    assert protocol == {"metric": f"{Brightness.__module__}.Brightness", "power": 2.0}


def test_class_accuracy_is_taken_anew_by_another_column(tmp_path: Path) -> None:
    images = write(tmp_path / "images", side=8)
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for file in sorted(images.iterdir()):
            tar.add(file, file.name)
            (row := file.with_suffix(".json")).write_text('{"first": 0, "never": 2}')
            tar.add(row, row.name)
    found = []
    for place, column in (("one", "first"), ("one", "never"), ("other", "never")):
        metrics = {"accuracy": ClassAccuracy(Classes(), column=column)}
        found.append(measure(tmp_path / "00000.tar", tmp_path / place, metrics)["accuracy"])
    assert found[1] == found[2] == 0 != found[0]
