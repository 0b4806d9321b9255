"""An evaluation that is killed, shared, batched otherwise or asked for more gives what one in one piece gives."""

import json
import os
import signal
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import evaluation_worker
import numpy as np
import pytest
from evaluation_worker import NUM_SAMPLES, SHARD, evaluate
from PIL import Image

from ldm.files import REMAINS

TIMES = ("seconds_sampling", "seconds_measuring")


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A folder of 30 real images."""
    folder = tmp_path_factory.mktemp("real")
    for i in range(30):
        pixels = np.random.default_rng(1000 + i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def whole(reference, tmp_path_factory) -> Path:
    """The folder of an evaluation that one process made in one piece."""
    folder = tmp_path_factory.mktemp("whole")
    evaluate(folder, reference)
    return folder


def start(folder: Path, reference: Path) -> BaseProcess:
    """Another process at the same evaluation; the server imports torch once for all of them."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["evaluation_worker"])
    process = context.Process(target=evaluate, args=(folder, reference))
    process.start()
    return process


def report(folder: Path) -> dict:
    """All that is said of metrics and samples; the hash of a reference does not depend on its place."""
    found = json.loads((folder / "evaluation.json").read_text())
    return {name: found[name] for name in found if name not in (*TIMES, "seconds", "protocol")}


def hashes(folder: Path) -> list[str]:
    return [json.loads(mark.read_text())["sha256"] for mark in sorted((folder / "samples").glob("*.done"))]


@pytest.mark.slow
def test_killed_and_then_finished_by_two_processes_it_has_the_same_bits(whole, reference, tmp_path) -> None:
    folder = tmp_path / "killed"
    first = start(folder, reference)
    while len(list((folder / "samples").glob("*.done"))) < 2:
        assert first.is_alive()
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    done = len(list((folder / "samples").glob("*.done")))
    assert 2 <= done < NUM_SAMPLES // SHARD
    written = {path: path.stat().st_mtime_ns for path in (folder / "samples").glob("*.done")}
    others = [start(folder, reference) for _ in range(2)]
    for process in others:
        process.join(timeout=120)
    assert [process.exitcode for process in others] == [0, 0]
    assert all(path.stat().st_mtime_ns == at for path, at in written.items())
    assert hashes(folder) == hashes(whole)
    assert report(folder) == report(whole)
    assert not list(folder.rglob(REMAINS))


@pytest.mark.parametrize("batch_size", [7, 64])
def test_batches_of_7_and_of_64_give_one_value(whole, reference, tmp_path, batch_size) -> None:
    evaluate(tmp_path, reference, batch_size=batch_size, feature_batch_size=batch_size)
    values = {name: value for name, value in report(tmp_path).items() if isinstance(value, float)}
    expected = {name: value for name, value in report(whole).items() if isinstance(value, float)}
    assert len(expected) == 10
    assert values == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_shards_of_another_size_hold_the_same_images_and_give_the_same_values(whole, reference, tmp_path) -> None:
    evaluate(tmp_path, reference, shard_size=20)
    assert len(hashes(tmp_path)) == 4
    assert report(tmp_path)["fid"] == pytest.approx(report(whole)["fid"], rel=1e-9)
    assert report(tmp_path)["kid/kid"] == pytest.approx(report(whole)["kid/kid"], rel=1e-9)


def test_an_evaluation_that_is_there_is_not_made_again(whole, reference, monkeypatch) -> None:
    monkeypatch.setattr(evaluation_worker, "draw", None)
    before = report(whole)
    figures = evaluate(whole, reference)
    assert {name: before[name] for name in figures if name not in TIMES} == {
        name: value for name, value in figures.items() if name not in TIMES
    }


def test_a_damaged_shard_is_made_again(whole, reference, tmp_path) -> None:
    evaluate(tmp_path, reference)
    (tmp_path / "samples" / "00001.tar").unlink()
    (tmp_path / "evaluation.json").unlink()
    evaluate(tmp_path, reference)
    assert hashes(tmp_path) == hashes(whole)


def test_every_image_of_a_set_is_seen_once_by_a_network_that_all_metrics_share(reference, tmp_path) -> None:
    seen = []
    judge = evaluation_worker.Judge
    original = judge.forward
    try:
        judge.forward = judge.embed_images = lambda self, images: seen.append(len(images)) or original(self, images)
        evaluate(tmp_path, reference)
    finally:
        judge.forward = judge.embed_images = original
    assert sum(seen) == NUM_SAMPLES + 30


def test_each_sample_says_what_it_is_and_how_it_scored(whole) -> None:
    lines = [json.loads(line) for line in (whole / "scores.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(NUM_SAMPLES))
    mean = sum(line["clip_score"] for line in lines) / NUM_SAMPLES
    assert mean == pytest.approx(report(whole)["clip_score"], rel=1e-9)
