"""Images that cannot be read: named in one line, or left out and listed."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import ShardDataModule
from ldm.generation.evaluation.evaluate import Evaluation, Subject
from ldm.generation.evaluation.images import SplitImages, open_images
from ldm.generation.evaluation.left_out import readable
from ldm.generation.evaluation.workers import FreeWorkers
from ldm.generation.report import EvaluationFolder
from ldm.metrics import FrechetDistance, PrecisionRecall, RandomFeatures, ReconstructionQuality

BAD = 4


def write(folder: Path, *, seed: int, cut: bool) -> Path:
    """Twelve pictures, number `BAD` of which is cut off, or is not there."""
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(seed).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    bad = folder / f"{BAD:02d}.png"
    if cut:
        bad.write_bytes(bad.read_bytes()[:200])
    else:
        bad.unlink()
    return folder


def as_shard(folder: Path) -> Path:
    """The pictures of a folder as a shard beside it."""
    place = folder.with_name(f"{folder.name}-shards")
    place.mkdir()
    with tarfile.open(place / "00000.tar", "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    return place


def measure(images: Path, folder: Path, reference: Path, **options) -> dict[str, float]:
    metrics = {"fid": FrechetDistance(RandomFeatures(4)), "pr": PrecisionRecall(RandomFeatures(4))}
    evaluation = Evaluation(metrics=metrics, reference=reference, **options)
    found = evaluation.of_images(images, Subject(folder, torch.device("cpu"), {}, FreeWorkers()))
    return {name: value for name, value in found.items() if not name.startswith("seconds")}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_named_in_one_line_that_says_how_to_go_on(num_workers: int, tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good", seed=1, cut=False), as_shard(write(tmp_path / "bad", seed=2, cut=True))
    with pytest.raises(
        ValueError, match=rf"00000\.tar: {BAD:02d}\.png cannot be decoded.*or set bad_images=skip"
    ) as one:
        measure(good, tmp_path / "out", bad, num_workers=num_workers)
    assert "\n" not in str(one.value) and "Traceback" not in str(one.value)


@pytest.mark.parametrize("as_shards", [False, True])
def test_without_unreadable_images_figures_are_those_of_the_others(as_shards: bool, tmp_path: Path) -> None:
    places = {}
    for name, seed, cut in (("one", 1, True), ("two", 2, True), ("one-whole", 1, False), ("two-whole", 2, False)):
        folder = write(tmp_path / name, seed=seed, cut=cut)
        places[name] = as_shard(folder) if as_shards else folder
    found = measure(places["one"], tmp_path / "out", places["two"], bad_images="skip")
    assert found == measure(places["one-whole"], tmp_path / "other", places["two-whole"])
    protocol = json.loads((tmp_path / "out" / "evaluation.json").read_text())["protocol"]
    named = f"00000.tar: {BAD:02d}" if as_shards else f"{BAD:02d}.png"
    for side in ("images", "reference"):
        assert protocol[side]["count"] == protocol["num_samples"] == 11
        assert protocol[side]["left_out"] == [{"index": BAD, "name": named}]


def test_a_page_shows_the_images_that_were_measured(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good", seed=1, cut=False), write(tmp_path / "bad", seed=2, cut=True)
    measure(good, tmp_path / "out", bad, bad_images="skip")
    shown = EvaluationFolder(tmp_path / "out").reference_pictures()
    expected = np.array(Image.open(bad / f"{BAD + 1:02d}.png"))
    assert np.array_equal(shown[BAD]["image"].permute(1, 2, 0).numpy(), expected)


def test_a_split_leaves_out_what_training_replaces(tmp_path: Path) -> None:
    shards = str(as_shard(write(tmp_path / "bad", seed=2, cut=True)))
    data = ShardDataModule(train=shards, validation=shards, batch_size=4, resolution=16)
    images = readable(SplitImages(data))
    assert len(images) == 11
    assert images.describe()["left_out"] == [{"index": BAD, "name": f"00000.tar: {BAD:02d}"}]


def test_an_image_that_is_left_out_leaves_its_original_alone(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good", seed=1, cut=False), write(tmp_path / "bad", seed=2, cut=True)
    Image.new("RGB", (16, 16)).save(good / f"{BAD:02d}.png")
    evaluation = Evaluation(metrics={"quality": ReconstructionQuality()}, reference=bad, bad_images="skip")
    with pytest.raises(ValueError, match="got 12 images and 11 originals"):
        evaluation.of_images(good, Subject(tmp_path / "out", torch.device("cpu"), {}, FreeWorkers()))


def test_a_set_without_unreadable_images_stays_itself(tmp_path: Path) -> None:
    images = open_images(write(tmp_path / "good", seed=1, cut=False))
    assert readable(images) is images


def test_a_set_of_unreadable_images_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"none")
    with pytest.raises(ValueError, match="got 1 images, of which none can be read"):
        readable(open_images(tmp_path))


def test_another_word_for_bad_images_is_refused() -> None:
    with pytest.raises(ValueError, match="got bad_images='ignore', expected one of refuse, skip"):
        Evaluation(metrics={"fid": FrechetDistance(RandomFeatures(4))}, bad_images="ignore")
