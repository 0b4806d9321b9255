"""`ldm` whose training is a formula: metrics.csv grows by a row a step, without Torch, in a second.

What the model's settings mean here: `learning_rate` decides the loss, `width` what happens (see below), and at step
`kill_at` the process kills itself, once.
"""

import os
import signal
import sys
import time
from typing import Any

from ldm.cli import train
from ldm.cli.console import DIVERGED
from ldm.cli.errors import RunFailed
from ldm.cli.main import main
from ldm.cli.run_folder import RunFolder

NUM_STEPS = 10
DIVERGES, CRASHES, NAN = 5, 6, 7


def produce(folder: RunFolder) -> dict[str, Any]:
    """Trains from where metrics.csv ends."""
    model, path = folder.config.model, folder.path / "metrics.csv"
    with (folder.path / "starts.txt").open("a") as file:
        file.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    if model.width == DIVERGES:
        raise RunFailed("training diverged at step 3", DIVERGED)
    if model.width == CRASHES:
        raise RuntimeError("the card fell out")
    if not path.exists():
        path.write_text("step,train/loss\n")
    for step in range(len(path.read_text().splitlines()) - 1, NUM_STEPS):
        loss = float("nan") if model.width == NAN else model.learning_rate + 1 / (step + 1)
        with path.open("a") as file:
            file.write(f"{step},{loss}\n")
        if step == model.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(model.seconds_per_step)
    return {"summary": {"learning_rate": model.learning_rate}}


if __name__ == "__main__":
    train.produce = produce
    sys.exit(main())
