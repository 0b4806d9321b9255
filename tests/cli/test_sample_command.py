"""`ldm sample` and `ldm evaluate` on a real, if tiny, text-to-image model."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import CONFIG_DIR, only, read_json
from PIL import Image

from ldm.cli.main import main

PROMPT = "a red handwritten seven on a blue background"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run of `toy_pictures`."""
    folder = tmp_path_factory.mktemp("pictures")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["train", *CONFIG_DIR, "experiment=toy_pictures"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def sample(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Samples from that run into a folder of the test's own."""
    monkeypatch.chdir(workplace)
    numbers = iter(range(100))

    def run(*overrides: str) -> Path:
        out = tmp_path / f"out{next(numbers)}"
        assert main(["sample", *overrides, f"out={out}"]) == 0
        return out

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_one_png_a_picture_a_grid_and_a_list(sample: Callable[..., Path]) -> None:
    out = sample(f"prompt={PROMPT}", "num_images=3", "seed=5")
    entries = read_json(out / "samples.json")
    assert [entry["seed"] for entry in entries] == [5, 6, 7]
    assert all(entry["prompt"] == PROMPT for entry in entries)
    files = {entry["file"] for entry in entries}
    assert {path.name for path in out.iterdir()} == {*files, "grid.png", "samples.json"}
    assert {Image.open(out / file).size for file in files} == {(32, 32)}


def test_a_png_carries_its_settings(sample: Callable[..., Path]) -> None:
    out = sample(f"prompt={PROMPT}", "sampler=heun", "steps=3", "guidance.scale=4", "negative_prompt=a blue nine")
    (entry,) = read_json(out / "samples.json")
    text = Image.open(out / entry["file"]).text
    assert json.loads(text["ldm"]) == entry
    assert entry["sampler"] == "Heun"
    assert entry["num_steps"] == 3
    assert entry["guidance"] == {"scale": 4, "rescale": 0.0}
    first, negative, rest = text["parameters"].splitlines()
    assert first == PROMPT
    assert negative == "Negative prompt: a blue nine"
    assert rest.startswith("Steps: 3, Sampler: Heun, CFG scale: 4, Seed: 0, Size: 32x32, Model: ")


def test_what_is_not_given_is_as_the_model_was_trained_to_be_sampled(sample: Callable[..., Path]) -> None:
    (entry,) = read_json(sample(f"prompt={PROMPT}") / "samples.json")
    assert (entry["sampler"], entry["discretization"], entry["num_steps"]) == ("Euler", "Uniform", 2)
    assert entry["guidance"] == {"scale": 2.0, "rescale": 0.0}


def test_a_prompt_and_a_seed_name_a_picture_in_any_batch(sample: Callable[..., Path]) -> None:
    together = sample(f"prompt={PROMPT}", "num_images=3", "batch_size=3")
    alone = sample(f"prompt={PROMPT}", "seed=2", "batch_size=1")
    np.testing.assert_array_equal(
        pixels(only(together, "00002_*_2.png")).astype(int), pixels(only(alone, "00000_*_2.png")).astype(int)
    )


def test_a_settings_change_reaches_the_picture(sample: Callable[..., Path]) -> None:
    plain = pixels(only(sample(f"prompt={PROMPT}"), "00000*"))
    guided = pixels(only(sample(f"prompt={PROMPT}", "guidance.scale=9"), "00000*"))
    assert (plain != guided).any()


def test_a_prompt_file_has_one_prompt_a_line(sample: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\n  the digit two, in red  \n")
    entries = read_json(sample(f"prompt_file={tmp_path / 'prompts.txt'}", "num_images=2") / "samples.json")
    assert [(entry["prompt"], entry["seed"]) for entry in entries] == [
        (PROMPT, 0),
        (PROMPT, 1),
        ("the digit two, in red", 0),
        ("the digit two, in red", 1),
    ]


def test_a_checkpoint_and_its_run_folder_are_the_same_model(sample: Callable[..., Path], workplace: Path) -> None:
    run = only(workplace, "runs/toy_pictures/*")
    from_folder = pixels(only(sample(f"prompt={PROMPT}", f"checkpoint={run}"), "00000*"))
    from_file = pixels(only(sample(f"prompt={PROMPT}", f"checkpoint={only(run, 'checkpoints/*')}"), "00000*"))
    np.testing.assert_array_equal(from_folder, from_file)


def test_an_empty_prompt_file_is_one_line(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    (tmp_path / "empty.txt").write_text("\n\n")
    assert main(["sample", f"prompt_file={tmp_path / 'empty.txt'}"]) == 2
    assert "without a line of text; expected one prompt a line" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("precision=8", "precision: got 8, expected one of 32, bf16, 16"),
        ("guidance.rescale=7", "got guidance.rescale=7"),
        ("guidance.scael=7", "guidance.scael: there is no such setting; did you mean guidance.scale?"),
        ("device=abacus", "device: got abacus"),
    ],
)
def test_a_wrong_setting_of_sampling_is_one_line(
    override: str, message: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    assert main(["sample", f"prompt={PROMPT}", override]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1


def test_training_ends_with_the_evaluation(workplace: Path) -> None:
    result = read_json(only(workplace, "runs/toy_pictures/*/result.json"))
    assert result["evaluation"] == {"pictures": 3, "settings": []}


def test_evaluate_measures_again_with_other_settings_beside_the_first(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    overrides = [
        "sampler=ddim",
        "steps=1",
        "guidance.scale=1",
        "++evaluation.num_pictures=2",
        f"out={tmp_path / 'again'}",
    ]
    assert main(["evaluate", *overrides]) == 0
    assert read_json(tmp_path / "again" / "evaluation.json") == {"pictures": 2}
    assert "pictures  2" in capsys.readouterr().out
    assert read_json(only(workplace, "runs/toy_pictures/*/evaluation.json")) == {"pictures": 3}
