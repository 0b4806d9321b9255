"""`ldm sample` and `ldm evaluate` on a real, if tiny, text-to-image model."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import only, read_json
from PIL import Image

from ldm.cli.main import main

PROMPT = "a red handwritten seven on a blue background"


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
    assert entry["guidance"] == {"scale": 4, "rescale": 0.0, "interval": [0.0, "inf"], "channels": None}
    first, negative, rest = text["parameters"].splitlines()
    assert first == PROMPT
    assert negative == "Negative prompt: a blue nine"
    assert rest.startswith("Steps: 3, Sampler: Heun, CFG scale: 4, Seed: 0, Size: 32x32, Model: ")


def test_what_is_not_given_is_as_the_model_was_trained_to_be_sampled(sample: Callable[..., Path]) -> None:
    (entry,) = read_json(sample(f"prompt={PROMPT}") / "samples.json")
    assert (entry["sampler"], entry["discretization"], entry["num_steps"]) == ("Euler", "Linspace", 2)
    assert entry["guidance"] == {"scale": 2.0, "rescale": 0.0, "interval": [0.0, "inf"], "channels": None}


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
    assert main(["evaluate", *overrides]) == 2  # its evaluation is none of ours
    assert main(["evaluate", *overrides, "trust=[toy_training]"]) == 0
    assert read_json(tmp_path / "again" / "evaluation.json") == {"pictures": 2}
    assert "pictures  2" in capsys.readouterr().out
    assert read_json(only(workplace, "runs/toy_pictures/*/evaluation.json")) == {"pictures": 3}


@pytest.fixture
def drawn(tmp_path: Path) -> Callable[..., Path]:
    """Writes a picture of blobs, or what a test makes of it, and returns its path."""

    def write(name: str = "image.png", size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Path:
        coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size).convert(mode).save(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """White on the left half."""
    white = Image.new("L", (32, 32))
    white.paste(255, (0, 0, 16, 32))
    white.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_image_to_image_records_what_it_starts_from(sample: Callable[..., Path], drawn: Callable[..., Path]) -> None:
    image = drawn()
    out = sample("task=image_to_image", f"image={image}", "strength=0.5", f"prompt={PROMPT}", "seeds=[4,9]")
    entries = read_json(out / "samples.json")
    assert [entry["seed"] for entry in entries] == [4, 9]
    for entry in entries:
        assert entry["task"] == {
            "name": "ImageToImage", "image": str(image), "strength": 0.5, "depth": None, "image_size": None
        }  # fmt: skip
        assert entry["files"] == {"image": sha256(image)}
        assert entry["image_size"] == 32
        assert json.loads(Image.open(out / entry["file"]).text["ldm"]) == entry


def test_inpainting_keeps_what_is_black(sample: Callable[..., Path], drawn: Callable[..., Path], mask: Path) -> None:
    image = drawn()
    out = sample("task=inpaint", f"image={image}", f"mask={mask}", f"prompt={PROMPT}")
    made, given = pixels(only(out, "00000*")), pixels(image)
    np.testing.assert_array_equal(made[:, 16:], given[:, 16:])
    assert (made[:, :16] != given[:, :16]).any()
    assert set(read_json(out / "samples.json")[0]["files"]) == {"image", "mask"}


def test_outpainting_makes_the_picture_larger(sample: Callable[..., Path], drawn: Callable[..., Path]) -> None:
    out = sample("task=outpaint", f"image={drawn()}", "left=8", "top=16", f"prompt={PROMPT}")
    (entry,) = read_json(out / "samples.json")
    assert Image.open(out / entry["file"]).size == (40, 48)
    assert entry["image_size"] == [48, 40]
    assert "Size: 40x48" in Image.open(out / entry["file"]).text["parameters"]


def test_variations_are_of_the_first_seed(sample: Callable[..., Path]) -> None:
    entries = read_json(sample("task=variations", "amount=0.5", f"prompt={PROMPT}", "num_images=3") / "samples.json")
    assert [(entry["seed"], entry.get("other_seed"), entry.get("amount")) for entry in entries] == [
        (0, None, None),
        (0, 1, 0.5),
        (0, 2, 0.5),
    ]


def test_a_varied_picture_is_named_by_both_seeds(sample: Callable[..., Path]) -> None:
    out = sample("task=variations", "amount=0.5", f"prompt={PROMPT}", "seeds=[3,7]")
    entry = read_json(out / "samples.json")[1]
    assert entry["file"].endswith("_3-7.png")
    text = Image.open(out / entry["file"]).text
    assert json.loads(text["ldm"]) == entry
    assert "Seed: 3, Variation seed: 7, Variation strength: 0.5, " in text["parameters"]
    assert "Variation" not in Image.open(only(out, "00000_*_3.png")).text["parameters"]


def test_interpolation_is_a_gif_and_its_frames(sample: Callable[..., Path]) -> None:
    out = sample("task=interpolate", f"prompt={PROMPT}", "to=a blue, (handwritten) two", "num_frames=3", "seeds=[1,2]")
    entries = read_json(out / "samples.json")
    assert [entry.get("amount") for entry in entries] == [None, pytest.approx(1 / 3), pytest.approx(2 / 3), None]
    assert (entries[1]["other_prompt"], entries[1]["other_seed"]) == ("a blue, (handwritten) two", 2)
    frame = Image.open(only(out, "00001_*_1-2.png")).text["parameters"]
    assert 'Variation prompt: "a blue, (handwritten) two", Variation seed: 2, Variation strength: 0.33' in frame
    with Image.open(out / "animation.gif") as animation:
        assert (animation.n_frames, animation.info["duration"], animation.info["loop"]) == (4, 120, 0)


def test_two_passes_and_a_size_of_two_numbers(sample: Callable[..., Path]) -> None:
    out = sample("task=two_pass", f"prompt={PROMPT}", "image_size=[16,32]")
    assert Image.open(only(out, "00000*")).size == (64, 32)
    out = sample("task=two_pass", "enlarge=3", f"prompt={PROMPT}", "image_size=[16,32]")
    assert Image.open(only(out, "00000*")).size == (96, 48)


def test_previews_and_trajectories(sample: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = sample(
        f"prompt={PROMPT}", "num_images=3", "batch_size=2", "steps=5", "preview_every=2", "save_trajectory=true"
    )
    names = [entry["file"].removesuffix(".png") for entry in read_json(out / "samples.json")]
    previews = {path.name for path in (out / "previews").iterdir()}
    assert previews == {f"{name}_step{step:04d}.png" for name in names for step in (2, 4)}
    printed = "".join(capsys.readouterr().out.split())
    assert "pictures3to3of3:step4of5" in printed
    assert all(f"{name}{out / name}" in printed for name in ("previews", "trajectories"))
    for name in names:
        strip = np.asarray(Image.open(out / "trajectories" / f"{name}.png"))
        assert strip.shape == (2 * 34 + 2, 5 * 34 + 2, 3)
        # At the end the sample is what is believed, and both are the picture.
        np.testing.assert_allclose(strip[2:34, -34:-2].astype(int), pixels(out / f"{name}.png"), atol=1)
        np.testing.assert_allclose(strip[36:68, -34:-2].astype(int), pixels(out / f"{name}.png"), atol=1)


def test_little_memory_gives_nearly_the_same_picture(sample: Callable[..., Path]) -> None:
    exact, low = sample(f"prompt={PROMPT}", "num_images=2"), sample(f"prompt={PROMPT}", "num_images=2", "memory=low")
    entry = read_json(low / "samples.json")[1]
    assert entry["precision"] == "half"
    assert entry["memory"] == {"name": "Memory", "tile": 64, "offload": True}
    error = pixels(only(low, "00001*")).astype(float) - pixels(only(exact, "00001*"))
    assert np.abs(error).mean() < 3


def test_post_processing_is_off_and_follows_the_given_order(
    sample: Callable[..., Path], drawn: Callable[..., Path]
) -> None:
    plain = sample(f"prompt={PROMPT}")
    assert read_json(plain / "samples.json")[0]["postprocess"] == []
    out = sample(
        f"prompt={PROMPT}",
        "postprocess=[sharpen,match_color]",
        "postprocess.sharpen.amount=2",
        f"postprocess.match_color.reference={drawn()}",
    )
    steps = read_json(out / "samples.json")[0]["postprocess"]
    assert [step["name"] for step in steps] == ["Sharpen", "MatchColor"]
    assert steps[0]["amount"] == 2
    assert (pixels(only(out, "00000*")) != pixels(only(plain, "00000*"))).any()


INPUT = ["task=image_to_image", f"prompt={PROMPT}"]
MISTAKES = {
    "no image": ([*INPUT], "image has no value; set it with image=..."),
    "missing": ([*INPUT, "image=nowhere.png"], "image: got nowhere.png, where there is no file; expected a JPEG"),
    "no picture": ([*INPUT, "image=text.png"], "image: got text.png, which cannot be read (no picture)"),
    "truncated": ([*INPUT, "image=truncated.png"], "image: got truncated.png, which cannot be read ("),
    "one pixel": ([*INPUT, "image=pixel.png"], "got a picture of 1x1 pixels, expected multiples of 2"),
    "no multiple": ([*INPUT, "image=odd.png"], "got a picture of 33x30 pixels, expected multiples of 2"),
    "strength": ([*INPUT, "image=image.png", "strength=1.5"], "got strength=1.5, expected above 0"),
    "word for strength": ([*INPUT, "image=image.png", "strength=high"], "strength: got 'high', expected a number"),
    "depth": ([*INPUT, "image=image.png", "depth=image.png"], "got depth for a model that takes 0 channels"),
    "mask size": (
        ["task=inpaint", f"prompt={PROMPT}", "image=image.png", "mask=odd.png"],
        "mask: got 33x30 pixels for an image of 32x32, expected the same size",
    ),
    "no upscaler": (
        ["task=upscale", f"prompt={PROMPT}", "image=image.png"],
        "got a model that takes 0 channels besides the latents, expected an upscaler",
    ),
    "other task's": ([f"prompt={PROMPT}", "strength=0.5"], "strength: there is no such setting"),
    "slip": (
        [*INPUT, "image=image.png", "strenght=0.5"],
        "strenght: there is no such setting; did you mean strength?",
    ),
    "negative without effect": (
        [f"prompt={PROMPT}", "negative_prompt=blue", "guidance.scale=1"],
        "got the negative prompt 'blue' with guidance.scale=1, at which it has no effect; expected another scale",
    ),
    "no lines": (["prompt_file=blank.txt"], "prompt_file: got blank.txt without a line of text; expected one prompt a"),
    "no task": (["task=inpain", f"prompt={PROMPT}"], "task=inpain: there is no such option; did you mean inpaint?"),
    "seeds": ([f"prompt={PROMPT}", "seeds=[1,2]", "num_images=3"], "seeds and num_images: got both, expected one"),
    "seeds no list": ([f"prompt={PROMPT}", "seeds=5"], "seeds: got 5, expected a list of integers, such as [1,7,9]"),
    "seeds empty": ([f"prompt={PROMPT}", "seeds=[]"], "seeds: got an empty list"),
    "lora": ([f"prompt={PROMPT}", "lora=[[1,2,3]]"], "lora: got [[1, 2, 3]], expected a file, [file, scale], or"),
    "lora number": ([f"prompt={PROMPT}", "lora=0.5"], "lora: got 0.5, expected a file, [file, scale], or a list"),
    "lora word": ([f"prompt={PROMPT}", "lora=[[a,b]]"], "lora: got [['a', 'b']], expected a file, [file, scale], or"),
    "embedding": ([f"prompt={PROMPT}", "embedding=5"], "embedding: got 5, expected a file, or a list of files"),
    "steps word": ([f"prompt={PROMPT}", "steps=abc"], "steps: got abc, expected a positive integer"),
    "steps fraction": ([f"prompt={PROMPT}", "steps=2.5"], "steps: got 2.5, expected a positive integer"),
    "seed": ([f"prompt={PROMPT}", "seed=1.5"], "seed: got 1.5, expected an integer"),
    "scale": ([f"prompt={PROMPT}", "guidance.scale=abc"], "guidance.scale: got abc, expected a number"),
    "rescale": ([f"prompt={PROMPT}", "guidance.rescale=[1]"], "guidance.rescale: got [1], expected a number"),
    "interval": ([f"prompt={PROMPT}", "guidance.interval=2"], "guidance.interval: got 2, expected two noise levels"),
    "interval word": (
        [f"prompt={PROMPT}", "guidance.interval=[a,b]"],
        "guidance.interval: got ['a', 'b'], expected two noise levels: [lowest,highest]",
    ),
    "negative side": (
        ["task=outpaint", f"prompt={PROMPT}", "image=image.png", "left=-16"],
        "got a negative number in left=-16, right=0",
    ),
    "no model": (
        [f"prompt={PROMPT}", "checkpoint=empty"],
        "checkpoint: got empty, which holds no weights and no whole checkpoint (an unfinished run?); expected a run",
    ),
    "retouching": (
        [f"prompt={PROMPT}", "postprocess=[sharpn]"],
        "postprocess=sharpn: there is no such option; did you mean sharpen? Options: denoise, match_color",
    ),
    "lora missing": ([f"prompt={PROMPT}", "lora=nowhere.safetensors"], "got nowhere.safetensors"),
    "prediction": ([f"prompt={PROMPT}", "prediction=v"], "got prediction= for "),
    "reference": ([f"prompt={PROMPT}", "postprocess=match_color"], "postprocess.match_color.reference has no value"),
    "size": ([f"prompt={PROMPT}", "image_size=31"], "got a picture of 31x31 pixels, expected multiples of 2"),
    "sizes": ([f"prompt={PROMPT}", "image_size=[32,32,32]"], "got image_size=[32, 32, 32], expected one number"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_input_is_one_line(
    name: str,
    workplace: Path,
    drawn: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    whole = drawn("image.png").read_bytes()
    drawn("odd.png", (33, 30)), drawn("pixel.png", (1, 1))
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    assert main(["sample", f"paths.runs={workplace / 'runs'}", "out=made", *overrides]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1
    assert not (tmp_path / "made").exists()


def test_out_is_a_new_folder(sample: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = sample(f"prompt={PROMPT}")
    (tmp_path / "cat.png").touch()
    capsys.readouterr()
    for place, message in {
        out: f"out: got {out}, which holds pictures (samples.json); name another, or remove it",
        tmp_path / "cat.png": f"out: got {tmp_path / 'cat.png'}, but {tmp_path / 'cat.png'} is a file; expected",
        tmp_path / "cat.png" / "made": f"out: got {tmp_path / 'cat.png' / 'made'}, but {tmp_path / 'cat.png'} is a",
    }.items():
        # Found before the model is looked for.
        assert main(["sample", f"prompt={PROMPT}", "checkpoint=nowhere", f"out={place}"]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"error: {message}")
        assert printed.count("\n") == 1


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1", "LA"])
def test_pictures_of_any_mode_are_read(mode: str, sample: Callable[..., Path], drawn: Callable[..., Path]) -> None:
    out = sample("task=image_to_image", f"image={drawn(mode=mode)}", f"prompt={PROMPT}")
    assert Image.open(only(out, "00000*")).mode == "RGB"
