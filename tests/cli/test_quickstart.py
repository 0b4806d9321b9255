"""The main job end to end, a few steps of everything, as a user types it."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]
TWO_PROCESSES = ["strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]


def test_the_chain_trains_on_two_processes_and_in_every_precision_evaluates_and_samples(
    ldm_process: Run, folder: Path
) -> None:
    done = ldm_process("train", "debug=fast", *TWO_PROCESSES, "run_id=two")
    assert done.returncode == 0, done.stderr
    runs = folder / "runs" / "debug"
    assert json.loads((runs / "quickstart/two/result.json").read_text())["evaluation"]["num_images"] == 16
    assert {path.parent.parent.name for path in runs.glob("*/*/result.json")} == {
        "digits",
        "digits_classifier",
        "digits_autoencoder",
        "digits_latents",
        "quickstart",
    }
    for precision in ("bf16-mixed", "16-mixed"):
        done = ldm_process("train", "debug=fast", f"trainer.precision={precision}", "trainer.accelerator=cpu")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("finished before, nothing to do") == 4
    prompt = "a red handwritten seven on a blue background"
    done = ldm_process("sample", f"prompt={prompt}", f"checkpoint={runs / 'quickstart/two'}", "out=pictures")
    assert done.returncode == 0, done.stderr
    assert Image.open(folder / "pictures" / "grid.png").size == (36, 36)
