from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers import TensorBoardLogger

from ldm.training.callbacks import SampleGrid
from ldm.training.callbacks.sample_grid import MAX_TRAJECTORY_COLUMNS, trajectory_strip


def test_grids_and_trajectories_are_written_every_so_many_steps_and_at_the_end(tiny, data, fit, tmp_path) -> None:
    fit(tiny, data, [SampleGrid(tmp_path / "samples", every_n_steps=4, prompts=["a", "b"])], max_steps=10)
    names = [f"{kind}step={step:06d}.png" for kind in ("", "trajectory_") for step in (4, 8, 10)]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == sorted(names)


def test_an_end_on_a_multiple_is_sampled_once(tiny, data, fit, tmp_path) -> None:
    fit(tiny, data, [SampleGrid(tmp_path, every_n_steps=3, prompts=["a"])], max_steps=6)
    assert len(tiny.sampled) == 2


def test_every_grid_has_the_same_prompts_and_seeds(tiny, data, fit, tmp_path) -> None:
    fit(tiny, data, [SampleGrid(tmp_path, every_n_steps=2, prompts=["a", "b"], seed=7)], max_steps=6)
    assert tiny.sampled == [(["a", "b"], [7, 8])] * 3


def test_without_prompts_the_first_validation_captions_are_sampled(tiny, data, fit, tmp_path) -> None:
    fit(tiny, data, [SampleGrid(tmp_path, every_n_steps=6, num_images=3)])
    assert tiny.sampled == [(["picture 0", "picture 1", "picture 2"], [0, 1, 2])]


def test_the_grid_shows_what_was_sampled(tiny, data, fit, tmp_path) -> None:
    fit(tiny, data, [SampleGrid(tmp_path, every_n_steps=6, prompts=["a", "b", "c", "d"], seed=10)])
    levels = np.unique(np.asarray(Image.open(tmp_path / "step=000006.png"))[..., 0])
    assert levels.tolist() == [10, 11, 12, 13, 255]


def test_long_trajectories_are_thinned_out_to_both_ends(tiny) -> None:
    strip = np.asarray(trajectory_strip(tiny.sample_trajectory("a", seed=0)))
    assert strip.shape[:2] == (2 * 10 + 2, MAX_TRAJECTORY_COLUMNS * 10 + 2)
    first_pixels = strip[5, 5::10][:MAX_TRAJECTORY_COLUMNS, 0].tolist()
    assert first_pixels[0] == 0 and first_pixels[-1] == 24


def test_a_short_trajectory_is_shown_whole(tiny) -> None:
    states = tiny.sample_trajectory("a", seed=0)[:1]
    assert trajectory_strip(states).size == (12, 22)


def test_tensorboard_gets_the_pictures(tiny, data, fit, tmp_path) -> None:
    logger = TensorBoardLogger(tmp_path, name="board", version="")
    fit(tiny, data, [SampleGrid(tmp_path, every_n_steps=6, prompts=["a"])], logger=logger)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert sorted(events.Tags()["images"]) == ["samples", "trajectory"]


def test_a_module_that_cannot_sample_is_refused_with_the_remedy(data, fit, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"got callback sample_grid with BoringModel.*~callback\.sample_grid"):
        fit(BoringModel(), data, [SampleGrid(tmp_path)])


def test_no_prompts_and_no_captions_are_refused(tiny, data, fit, tmp_path) -> None:
    data._batch = lambda indices: {"image": None}
    with pytest.raises(ValueError, match="without captions"):
        fit(tiny, data, [SampleGrid(tmp_path)])


def test_an_encoder_that_prompts_alone_need_is_missed_before_training(tiny, data, fit, tmp_path, monkeypatch) -> None:
    def no_encoder(text: str) -> int:
        raise ValueError("conditioner.encoder: got none")

    pipeline = SimpleNamespace(conditioner=SimpleNamespace(num_chunks=no_encoder), require_plain=lambda: None)
    monkeypatch.setattr(tiny, "pipeline", lambda: pipeline, raising=False)
    with pytest.raises(ValueError, match=r"^conditioner\.encoder: got none; or leave out .*~callback\.sample_grid"):
        fit(tiny, data, [SampleGrid(tmp_path)])
    assert tiny.global_step == 0
