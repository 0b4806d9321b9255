import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.testing import assert_close

from ldm.cli.compose import conf_folder
from ldm.generation.evaluation.workers import RankWorkers
from ldm.metrics import FrechetDistance, InceptionScore, KernelDistance
from ldm.training.callbacks import BestCheckpoint, SampleMetrics, StopEarly

ALONE = RankWorkers(0, 1, lambda: None)


class Means(nn.Module):
    """The mean of each channel."""

    num_features = 3

    def forward(self, images):
        return images.double().mean((2, 3))


def metrics(**settings) -> SampleMetrics:
    chosen = {"fid": FrechetDistance(Means()), "inception_score": InceptionScore(Means(), splits=2)}
    return SampleMetrics(**({"metrics": chosen, "num_images": 10, "every_n_steps": 2, "batch_size": 4} | settings))


def measured(callback, data, module, folder) -> dict[str, float]:
    return callback.measure(data, module, folder, ranks=ALONE, step=2)


def validating(fit, tiny, data, callback, *others, **settings):
    return fit(tiny, data, [callback, *others], **({"limit_val_batches": 1.0, "val_check_interval": 2} | settings))


def test_metrics_are_logged_at_validation(tiny, data, fit, logged) -> None:
    trainer = validating(fit, tiny, data, metrics(), max_steps=4)
    names = {"val/fid", "val/inception_score", "val/inception_score/std", "val/sampling_seconds"}
    assert names <= set(trainer.callback_metrics)
    assert len(logged("val/fid")) == 2


def test_the_best_checkpoint_and_the_end_of_training_go_by_them(tiny, data, fit, tmp_path) -> None:
    # Measured at every second validation, of which the first is not one.
    callbacks = [metrics(every_n_steps=4), BestCheckpoint(tmp_path / "best"), StopEarly(patience=1)]
    trainer = validating(fit, tiny, data, *callbacks, max_steps=40, enable_checkpointing=True)
    # The samples never change, and so the distance does not fall either.
    assert trainer.global_step == 8
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["step=4.ckpt"]
    assert callbacks[1].best_model_score == trainer.callback_metrics["val/fid"]


@pytest.mark.parametrize("build", [lambda folder: BestCheckpoint(folder), lambda folder: StopEarly()])
def test_a_figure_that_nothing_measures_is_refused_at_the_start(tiny, data, fit, tmp_path, build) -> None:
    with pytest.raises(ValueError, match=r"got monitor=val/fid, which nothing measures.*set \+callback=fid"):
        validating(fit, tiny, data, build(tmp_path), max_steps=4, enable_checkpointing=True)


def test_other_figures_are_looked_at_at_every_validation(tiny, data, fit, tmp_path) -> None:
    callbacks = [metrics(every_n_steps=100), BestCheckpoint(tmp_path / "best", monitor="val/loss", mode="max")]
    trainer = validating(fit, tiny, data, *callbacks, max_steps=4, enable_checkpointing=True)
    assert callbacks[1].best_model_score >= trainer.callback_metrics["val/loss"]


def test_the_logged_distance_is_that_of_the_sampled_and_the_validation_images(tiny, data, fit, logged) -> None:
    validating(fit, tiny, data, metrics(), max_steps=2)
    expected = FrechetDistance(Means())
    expected.update(next(data.iterate_once("validation", 10))["image"], real=True)
    pictures = np.stack([np.asarray(picture) for picture in tiny.sample([""] * 10, seeds=range(10))])
    expected.update(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1, real=False)
    [value] = logged("val/fid").values()
    assert value == pytest.approx(expected.compute().item(), rel=1e-5)


def test_one_set_of_samples_serves_all_metrics_with_settings_of_its_own(tiny, data, fit) -> None:
    validating(fit, tiny, data, metrics(sampling={"num_steps": 3}), max_steps=2)
    assert [seed for _, seeds in tiny.sampled for seed in seeds] == list(range(10))
    assert tiny.settings == {"num_steps": 3}


def test_every_evaluation_measures_the_same_pictures_anew(tiny, data, fit, logged) -> None:
    validating(fit, tiny, data, metrics(), max_steps=4)
    first, second = logged("val/fid").values()
    assert first == pytest.approx(second, rel=1e-6)
    assert sum(len(seeds) for _, seeds in tiny.sampled) == 20


@pytest.mark.parametrize("num_images", [3, 10, 25])
def test_prompts_are_spread_over_the_validation_captions(tiny, data, tmp_path, num_images: int) -> None:
    measured(metrics(num_images=num_images), data, tiny, tmp_path / "here")
    captions = [caption for captions, _ in tiny.sampled for caption in captions]
    counts = torch.tensor([captions.count(f"picture {i}") for i in range(10)])
    assert counts.sum() == num_images
    assert counts.max() - counts.min() <= 1


def test_prompts_of_ones_own_take_their_place(tiny, data, tmp_path) -> None:
    measured(metrics(prompts=["a", {"prompt": "b", "digit": 1}], num_images=4), data, tiny, tmp_path / "here")
    assert [text for texts, _ in tiny.sampled for text in texts] == ["a", "a", "b", "b"]


def test_values_do_not_depend_on_the_batch_or_the_number_of_ranks(tiny, data, tmp_path) -> None:
    expected = measured(metrics(), data, tiny, tmp_path / "one")
    assert_close(measured(metrics(batch_size=10), data, tiny, tmp_path / "ten"), expected, rtol=1e-9, atol=1e-9)
    barrier = Barrier(2)
    ranks = [RankWorkers(rank, 2, barrier.wait) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(
            pool.map(lambda rank: metrics().measure(data, type(tiny)(), tmp_path / "two", ranks=rank, step=2), ranks)
        )
    assert found == [pytest.approx(expected, rel=1e-12)] * 2


def test_the_protocol_lies_beside_the_figures_and_images_stay_if_wanted(tiny, data, fit, tmp_path) -> None:
    kept = metrics(folder=tmp_path / "evaluations", keep_images=True, reference=data)
    validating(fit, tiny, data, kept, max_steps=2)
    folder = tmp_path / "evaluations" / "step=000002"
    written = json.loads((folder / "evaluation.json").read_text())
    assert written["protocol"]["checkpoint"]["step"] == 2
    assert written["protocol"]["reference"]["count"] == written["num_images"] == 10
    assert written["metrics"]["fid"]["protocol"]["features"]["network"].endswith("Means")
    assert len(list((folder / "samples").glob("*.tar"))) == 3
    validating(fit, tiny, data, metrics(folder=tmp_path / "again"), max_steps=2)
    assert not (tmp_path / "again" / "step=000002" / "samples").exists()
    assert (tmp_path / "again" / "step=000002" / "evaluation.png").is_file()


def test_a_reference_gives_the_real_images_where_the_data_has_none(tiny, data, tmp_path) -> None:
    with_images = measured(metrics(), data, tiny, tmp_path / "one")
    latents = type(data)()
    plain = latents._batch
    latents._batch = lambda indices: {k: v for k, v in plain(indices).items() if k != "image"}
    assert measured(metrics(reference=data), latents, tiny, tmp_path / "two") == with_images
    with pytest.raises(ValueError, match=r"set reference to data"):
        measured(metrics(), latents, tiny, tmp_path / "three")


def test_what_would_fail_after_sampling_fails_when_training_starts(tiny, data, fit) -> None:
    few = metrics(metrics={"kid": KernelDistance(Means(), subset_size=11)})
    with pytest.raises(ValueError, match="got 10 generated images for KernelDistance, expected at least 11"):
        validating(fit, tiny, data, few, max_steps=2)
    assert not tiny.sampled


def test_rounds_between_validations_are_left_out(tiny, data, fit) -> None:
    validating(fit, tiny, data, metrics(every_n_steps=4), max_steps=8)
    assert sum(len(seeds) for _, seeds in tiny.sampled) == 20


def test_a_setting_of_sampling_that_there_is_not_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"got sampling\.num_stepss, expected some of .*num_steps"):
        metrics(sampling={"num_stepss": 8})


def test_the_protocol_tells_what_guidance_leads_away_from(tiny, data, tmp_path) -> None:
    measured(metrics(sampling={"negative_prompt": "grey", "num_steps": 2}), data, tiny, tmp_path)
    protocol = json.loads((tmp_path / "evaluation.json").read_text())["protocol"]
    assert protocol["negative_prompt"] == "grey"


@pytest.mark.parametrize("name", ["fid", "digits_fid"])
def test_a_callback_of_metrics_takes_settings_of_sampling(name: str) -> None:
    with initialize_config_dir(str(conf_folder()), version_base=None):
        overrides = ["experiment=quickstart", f"+callback={name}", "callback.sample_metrics.sampling={num_steps: 8}"]
        config = compose("train", overrides=overrides)
    assert config.callback.sample_metrics.sampling == {"num_steps": 8}


def test_no_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="got no metric for sampled images"):
        SampleMetrics()


@pytest.mark.slow
def test_two_processes_share_the_samples_and_log_what_one_does(tiny, data, tmp_path) -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parents[2]), str(here)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here / "sample_metrics_worker.py"), str(tmp_path), "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    judged = {"fid": FrechetDistance(Means()), "kid": KernelDistance(Means(), num_subsets=3, subset_size=5)}
    alone = metrics(metrics=judged, num_images=11, batch_size=3, folder=tmp_path, keep_images=True)
    expected = measured(alone, data, tiny, tmp_path / "alone")
    assert len(expected) == 5
    for name, value in expected.items():
        assert first["values"][f"val/{name}"] == second["values"][f"val/{name}"] == pytest.approx(value, rel=1e-5)
    # Four shards a round: each rank draws two of them, in both rounds.
    assert set(first["seeds"]) | set(second["seeds"]) == set(range(11))
    assert not set(first["seeds"]) & set(second["seeds"])
    folders = (tmp_path / "alone", tmp_path / "evaluations/step=000004")
    one, two = ([json.loads(mark.read_text())["sha256"] for mark in sorted(f.glob("samples/*.done"))] for f in folders)
    assert one == two
    assert len(one) == 4
    figures = [json.loads((folder / "evaluation.json").read_text())["metrics"]["fid"]["value"] for folder in folders]
    assert figures[0] == pytest.approx(figures[1], rel=1e-12)
