"""`ldm evaluate` as a user types it, on a tiny model and on other people's samples."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import read_json
from PIL import Image

from ldm.autoencoders import IdentityAutoencoder
from ldm.cli.main import main
from ldm.nn.weights import save_weights

# Any nn.Module with num_features, by _target_: the one that comes with the toys.
JUDGE = "{_target_: toy_training.Pixels}"
FID = f"+metric.fid={{_target_: ldm.metrics.FrechetDistance, features: {JUDGE}}}"
KID = f"+metric.kid={{_target_: ldm.metrics.KernelDistance, features: {JUDGE}, num_subsets: 3, subset_size: 10}}"
ACCURACY = f"+metric.class_accuracy={{_target_: ldm.metrics.ClassAccuracy, classifier: {JUDGE}, column: digit}}"
PRECISION = f"+metric.precision_recall={{_target_: ldm.metrics.PrecisionRecall, features: {JUDGE}}}"
QUIET = "report=null"


@pytest.fixture
def evaluate(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command in that folder and returns its exit code."""
    monkeypatch.chdir(workplace)
    return lambda *overrides: main(["evaluate", QUIET, "trust=[toy_training]", *overrides])


def pictures(count: int, seed: int = 0, side: int = 32) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def figures(folder: Path) -> dict:
    return {
        k: v for k, v in read_json(folder / "evaluation.json").items() if isinstance(v, float) and "seconds" not in k
    }


def test_a_model_is_sampled_and_measured_and_its_protocol_says_how(
    evaluate: Callable[..., int], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("num_samples=12", "shard_size=5", "steps=1", "sampler=ddim", "guidance.scale=1.5", "reference_cache=refs")
    assert evaluate(FID, *chosen) == 0
    [folder] = workplace.glob("runs/toy_pictures/*/evaluations/*/plan.json")
    folder = folder.parent
    assert "fid" in capsys.readouterr().out
    protocol = read_json(folder / "evaluation.json")["protocol"]
    assert (protocol["num_samples"], protocol["steps"], protocol["seed"]) == (12, 1, 0)
    assert (protocol["sampler"]["name"], protocol["guidance"]["scale"]) == ("DDIM", 1.5)
    assert protocol["ema"] == 0.5
    assert protocol["reference"]["preprocessing"]["resolution"] == 32
    assert len(protocol["checkpoint"]["sha256"]) == 64
    assert protocol["versions"]["ldm"]
    assert protocol["prompts"]["source"] == "validation captions of the run's data"
    assert [path.name for path in sorted((folder / "samples").glob("*.tar"))] == ["00000.tar", "00001.tar", "00002.tar"]
    # Another metric of the same samples: nothing is sampled anew, and the first figure stays.
    written = {path: path.stat().st_mtime_ns for path in (folder / "samples").iterdir()}
    assert evaluate(KID, ACCURACY, *chosen) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "samples").iterdir()} == written
    assert {"fid", "kid/kid", "class_accuracy"} <= figures(folder).keys()


def test_prompts_come_from_a_file_of_captions(evaluate: Callable[..., int], tmp_path: Path) -> None:
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"annotations": [{"id": i, "caption": f"a red {i}"} for i in range(3)]}))
    accuracy = ACCURACY.replace("column: digit", "column: id")
    assert evaluate(accuracy, f"prompts={captions}", "num_samples=6", "steps=1", f"out={tmp_path / 'out'}") == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(6))
    assert read_json(tmp_path / "out" / "plan.json")["prompts"]["count"] == 3


def test_other_peoples_samples_score_the_same_from_a_folder_a_zip_an_npz_and_shards(
    evaluate: Callable[..., int], tmp_path: Path
) -> None:
    made = pictures(14)
    places = {name: tmp_path / name for name in ("folder", "made.zip", "made.npz", "real")}
    for place, images in ((places["folder"], made), (places["real"], pictures(15, seed=1))):
        place.mkdir()
        for i, image in enumerate(images):
            image.save(place / f"{i:03d}.png")
    with zipfile.ZipFile(places["made.zip"], "w") as archive:
        for path in sorted(places["folder"].iterdir()):
            archive.write(path, path.name)
    np.savez(places["made.npz"], arr_0=np.stack([np.asarray(image) for image in made]))
    found = []
    for name in ("folder", "made.zip", "made.npz"):
        out = tmp_path / f"out-{name}"
        assert evaluate(f"images={places[name]}", f"reference={places['real']}", FID, KID, PRECISION, f"out={out}") == 0
        found.append(figures(out))
    assert found[0] == found[1] == found[2]
    assert read_json(out / "evaluation.json")["protocol"]["images"]["count"] == 14


def test_published_statistics_are_a_reference_as_they_are(evaluate: Callable[..., int], tmp_path: Path) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(12), sigma=np.eye(12))
    np.savez(tmp_path / "made.npz", arr_0=np.stack([np.asarray(image) for image in pictures(30)]))
    both = (f"images={tmp_path / 'made.npz'}", f"reference={tmp_path / 'stats.npz'}", f"out={tmp_path / 'out'}")
    assert evaluate(*both, FID) == 0
    assert read_json(tmp_path / "out" / "evaluation.json")["metrics"]["fid"]["protocol"]["reference"]["sha256"]
    assert evaluate(*both, KID) == 2  # statistics hold no images


def test_an_autoencoder_is_measured_by_what_it_gives_back(evaluate: Callable[..., int], tmp_path: Path) -> None:
    file = tmp_path / "autoencoder.safetensors"
    identity = IdentityAutoencoder()
    save_weights(file, identity.state_dict(), target="ldm.autoencoders.IdentityAutoencoder", config={})
    for seed in (0, 1):
        np.savez(tmp_path / f"{seed}.npz", arr_0=np.stack([np.asarray(image) for image in pictures(12, seed)]))
        assert evaluate(f"reconstruct={file}", "metrics=[reconstruction]", f"reference={tmp_path}/{seed}.npz") == 0
    # Another reference is another evaluation.
    found = [figures(folder) for folder in (tmp_path / "evaluations").glob("reconstructions-*")]
    assert [one["reconstruction/psnr"] for one in found] == [100, 100]
    assert evaluate(f"reconstruct={file}", "metrics=[codebook_usage]", f"reference={tmp_path}/0.npz") == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["metrics=[fid]"], "metric.fid.features: got no Inception weights at"),
        (["metrics=[fidd]"], "metric=fidd: there is no such option; did you mean fid?"),
        ([FID, "images=nowhere"], "got nowhere, expected a folder, a .zip or .npz of images, or WebDataset shards"),
        ([FID, "images=runs", "checkpoint=runs"], "images and checkpoint: got both"),
        ([FID, "images=runs", "num_samples=9"], "num_samples: got one with images=..., which samples nothing"),
        ([FID, "images=runs", "guidance.scale=2"], "guidance.scale: got one with images=..."),
        ([FID, "num_samples=1"], "got 1 generated images, expected at least 2 for a covariance"),
        ([FID, "prompts=nowhere.txt"], "prompts: got nowhere.txt, where there is no file"),
        ([FID, "num_samples=0"], "num_samples: got 0, expected a positive integer"),
        ([KID, "num_samples=5"], "got 5 generated images for KernelDistance, expected at least 10"),
        ([ACCURACY.replace("digit", "horse"), "num_samples=5"], "class_accuracy: got prompts with the labels"),
    ],
)
def test_a_mistake_is_one_line(
    overrides: list[str], message: str, evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(*overrides) == 2
    printed = capsys.readouterr().err
    line = next(line for line in printed.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {message}")
    assert printed.count("error: ") == 1


@pytest.mark.slow
def test_two_processes_of_an_executor_write_what_one_does(
    evaluate: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    chosen = (FID, KID, "num_samples=12", "shard_size=4", "steps=1", f"reference_cache={tmp_path / 'refs'}")
    assert evaluate(*chosen, f"out={tmp_path / 'one'}") == 0
    assert evaluate(*chosen, f"out={tmp_path / 'two'}", "executor=local", "executor.workers=2") == 0
    assert figures(tmp_path / "one") == figures(tmp_path / "two")
    assert len(list((tmp_path / "two" / "samples").glob("*.done"))) == 3
    hashes = [
        [read_json(mark)["sha256"] for mark in sorted((tmp_path / name / "samples").glob("*.done"))]
        for name in ("one", "two")
    ]
    assert hashes[0] == hashes[1]
