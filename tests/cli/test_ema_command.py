"""`ldm ema` on a real, if tiny, run: what it writes loads and samples, and mistakes are one line."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import CONFIG_DIR, only
from safetensors import safe_open
from safetensors.torch import load_file

import ldm as package
from ldm.cli.main import main
from ldm.nn.weights import read_weights

TRACKING = ["callback=[checkpoint,post_hoc_ema]", "callback.post_hoc_ema.every_n_steps=1"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run of `toy_pictures` that kept snapshots."""
    folder = tmp_path_factory.mktemp("snapshots")
    before = Path.cwd()
    os.chdir(folder)
    try:
        tracking = [*TRACKING, "callback.post_hoc_ema.dtype=float32"]
        assert main(["train", *CONFIG_DIR, "experiment=toy_pictures", *tracking]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder, from within the folder around it."""
    monkeypatch.chdir(workplace)
    return only(workplace, "runs/toy_pictures/*")


@pytest.fixture
def fails(run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `ldm ema`, which is to fail, and gives its one line."""

    def execute(*overrides: str) -> str:
        assert main(["ema", *overrides]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return execute


def test_it_takes_the_newest_run_and_says_what_it_made(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ema", "sigma_rel=0.07"]) == 0
    report = capsys.readouterr().out
    made = run / "ema/sigma_rel_0.07_step_3.safetensors"
    for said in ("sigma_rel 0.07 at step 3", str(made.relative_to(Path.cwd())), "gamma       11.24", "6 of 6", "% off"):
        assert said in report
    state, target, config = read_weights(made)
    own, own_target, own_config = read_weights(run / "weights.safetensors")
    facts = config.pop("post_hoc_ema")
    assert (facts["sigma_rel"], facts["step"], target, config) == (0.07, 3, own_target, own_config)
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in own.items()}


def test_a_tracked_length_is_the_snapshots_own_average(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "tracked.safetensors"
    assert main(["ema", f"run={run}", "sigma_rel=0.05", "step=2", f"out={out}"]) == 0
    made, tracked = load_file(out), load_file(run / "snapshots/step=000000002-sigma_rel=0.05.safetensors")
    for name, tensor in tracked.items():
        assert float((made[name] - tensor).abs().max()) <= 1e-6


def test_what_it_writes_samples_like_the_runs_own_weights(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "wide.safetensors"
    assert main(["ema", f"run={run}", "sigma_rel=0.2", f"out={out}"]) == 0
    assert main(["sample", "prompt=a red seven", f"checkpoint={out}", f"out={tmp_path / 'pictures'}"]) == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    prompts = ["a red handwritten seven on a blue background"]
    pixels = [package.load(path, device="cpu").sample(prompts, seeds=[0])[0].tobytes() for path in (out, run)]
    assert pixels[0] != pixels[1]


def test_a_sweep_makes_one_file_each(run: Path) -> None:
    assert main(["ema", "-m", f"run={run}", "sigma_rel=0.11,0.12", "step=3"]) == 0
    for sigma_rel in (0.11, 0.12):
        with safe_open(run / f"ema/sigma_rel_{sigma_rel}_step_3.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["config"])["post_hoc_ema"]["sigma_rel"] == sigma_rel


def test_a_run_without_weights_of_its_own_has_averages_too(run: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    for name in ("config.yaml", "snapshots"):
        (stopped / name).symlink_to(run / name)
    out = tmp_path / "made.safetensors"
    assert main(["ema", f"run={stopped}", f"out={out}"]) == 0
    assert read_weights(out)[2]["name"] == "toy_pictures"
    assert package.load(out, device="cpu").settings.num_steps == 2


def test_mistakes_are_one_line_each(fails: Callable[..., str], run: Path, tmp_path: Path) -> None:
    assert "run: got nowhere, expected a run folder" in fails("run=nowhere")
    assert "has snapshots; train with +callback=post_hoc_ema" in fails(f"paths.runs={tmp_path}")
    assert "got sigma_rel=0.4, expected more than 0" in fails("sigma_rel=0.4")
    assert "got step=7, expected that of a snapshot, 1 to 3; the nearest is 3" in fails("step=7")
    assert "out: got made.ckpt, expected NAME.safetensors" in fails("out=made.ckpt")
    weights = run / "weights.safetensors"
    assert "exists already" in fails(f"out={weights}")
    digits = only(Path.cwd(), "runs/digits/*")
    assert "got no snapshots in" in fails(f"run={digits}")
