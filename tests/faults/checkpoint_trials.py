"""Faults injected while checkpoints are saved, in a process that forks for each: a fork of a busy one may hang.

    python checkpoint_trials.py FOLDER [TRIALS]

prints what was found as JSON; FOLDER is for the files.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from ldm.training.checkpoint_background import BackgroundCheckpointIO
from ldm.training.checkpoint_files import StorageError, is_valid, put_in_place, seal
from ldm.training.checkpoint_folders import find, newest_valid, sweep
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.checkpoint_parts import read
from ldm.training.checkpoints import Checkpoints

PROTOCOL = ("checkpoint_files.py", "checkpoint_folders.py", "checkpoint_io.py")
SHARED_MEMORY = Path("/dev/shm")


def state(step: int, *, size: int = 1000) -> dict[str, Any]:
    """A checkpoint whose every number is its step."""
    weights = {"w": torch.full((size,), float(step)), "ema.w": torch.full((size,), float(step))}
    return {"global_step": step, "state_dict": weights, "optimizer_states": [torch.full((size,), float(step))]}


def step_of(place: Path) -> int:
    """The one step that everything in a checkpoint is of; fails for a mixture."""
    found = read(place)
    tensors = [*found["state_dict"].values(), *found["optimizer_states"]]
    values = {found["global_step"], *(value for tensor in tensors for value in tensor.unique().tolist())}
    assert len(values) == 1, values
    return int(values.pop())


def in_child(action: Callable[[], None], *, kill_after: float | None = None) -> int:
    """Runs an action in a forked process, killing it after some seconds if asked; the exit status, -9 for killed."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_line(number: int, action: Callable[[], None]) -> Callable[[], None]:
    """The action, killed with SIGKILL just before the protocol executes its `number`-th line."""
    left = number

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(PROTOCOL):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def run() -> None:
        sys.settrace(trace)
        action()

    return run


def lines_of(action: Callable[[], None]) -> int:
    """How many lines of the protocol an action executes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith(PROTOCOL):
            return None
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)
    return count


def write_over(folder: Path) -> None:
    """Saves step 3 under the name that step 2 has."""
    AtomicCheckpointIO().save_checkpoint(state(3), folder / "last.ckpt")


def save_and_remove(folder: Path) -> None:
    """Saves step 3 under a new name and removes step 1."""
    io = AtomicCheckpointIO()
    io.save_checkpoint(state(3), folder / "step=3.ckpt")
    io.remove_checkpoint(folder / "step=1.ckpt")


def seal_and_replace(folder: Path) -> None:
    """Replaces step 2 by a folder with step 3 that others have filled, as processes with shards do."""
    temporary = folder / ".last.ckpt.0.tmp"
    shutil.copytree(folder / "filled", temporary)
    seal(temporary, facts={"step": 3})
    put_in_place(temporary, folder / "last.ckpt")


class Filling(pl.LightningModule):
    """Writes a letter a step; at step 12 the disk fills up."""

    def __init__(self, steps: Path) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4000)
        self.steps = steps

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        with self.steps.open("a") as file:
            file.write(".")
        time.sleep(0.02)
        if self.global_step == 12:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def kill_in_save(folder: Path, action: Callable[[Path], None], *, trials: int) -> dict[str, Any]:
    """Kills the action at so many places, evenly spread over all it does; what is left each time."""
    io, new = AtomicCheckpointIO(), action is save_and_remove
    io.save_checkpoint(state(1), folder / "before" / "step=1.ckpt")
    io.save_checkpoint(state(2), folder / "before" / ("step=2.ckpt" if new else "last.ckpt"))
    io.save_checkpoint(state(3), folder / "before" / "filled")
    shutil.copytree(folder / "before", folder / "whole")
    total = lines_of(lambda: action(folder / "whole"))
    found: dict[str, list[Any]] = {"killed": [], "step": [], "valid": [], "damaged": [], "litter": [], "swept": []}
    for trial in range(trials):
        place = folder / str(trial)
        shutil.copytree(folder / "before", place)
        run = killed_at_line(1 + trial * total // trials, lambda place=place: action(place))
        found["killed"].append(in_child(run) == -signal.SIGKILL)
        found["swept"].append(len(sweep(place)))
        valid = [is_valid(checkpoint) for checkpoint in find(place)]
        newest = newest_valid(place)
        found["step"].append(None if newest is None else step_of(newest))
        found["valid"].append(sum(valid))
        found["damaged"].append(len(valid) - sum(valid))
        found["litter"].append(sorted(path.name for path in place.rglob("*") if path.name.endswith(".tmp")))
    return {"lines": total, **found}


def kill_at_any_time(folder: Path, *, trials: int, shortest: float = 0.1) -> dict[str, Any]:
    """Kills, at random times, a process that saves over the same checkpoint; TMPDIR is on another disk.

    Where none of a process' saves came through, as on a busy machine, the next one has longer.
    """
    path, before, times = folder / "last.ckpt", set(SHARED_MEMORY.glob("*")), random.Random(0)
    os.environ["TMPDIR"] = str(SHARED_MEMORY)
    AtomicCheckpointIO().save_checkpoint(state(1, size=200_000), path)

    def save_for_ever() -> None:
        step = step_of(path)
        while True:
            step += 1
            AtomicCheckpointIO().save_checkpoint(state(step, size=200_000), path)

    steps, destroyed, longest = [1], 0, shortest
    for _ in range(trials):
        in_child(save_for_ever, kill_after=times.uniform(0.005, longest))
        destroyed += not is_valid(path)
        steps.append(step_of(path))
        longest = longest * 1.5 if steps[-1] == steps[-2] else max(shortest, longest / 1.5)
    sweep(folder)
    # Others may use the shared memory at the same time: what is named as ours counts.
    litter = [entry.name for entry in set(SHARED_MEMORY.glob("*")) - before if "ckpt" in entry.name]
    return {"steps": steps, "destroyed": destroyed, "litter": litter, "files": len(list(path.iterdir()))}


def fill_the_disk(folder: Path, io: type[AtomicCheckpointIO]) -> dict[str, Any]:
    """Trains with a checkpoint every 5 steps, where from step 12 on no file may become larger than 20 kB."""

    def train() -> None:
        trainer = pl.Trainer(
            max_steps=30,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            plugins=[io()],
            callbacks=[Checkpoints(folder / "checkpoints", every_n_steps=5)],
        )
        try:
            trainer.fit(Filling(folder / "steps.txt"), DataLoader(TensorDataset(torch.ones(100, 4)), batch_size=2))
        except StorageError as error:
            (folder / "said.txt").write_text(str(error))

    folder.mkdir()
    status, checkpoints = in_child(train), folder / "checkpoints"
    return {
        "status": status,
        "said": (folder / "said.txt").read_text(),
        "steps": len((folder / "steps.txt").read_text()),
        "names": sorted(path.name for path in checkpoints.iterdir()),
        "valid": sum(is_valid(place) for place in find(checkpoints)),
    }


def main() -> None:
    folder, trials = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 15
    actions = (write_over, save_and_remove, seal_and_replace)
    found = {action.__name__: kill_in_save(folder / action.__name__, action, trials=trials) for action in actions}
    found["any_time"] = kill_at_any_time(folder / "any_time", trials=2 * trials)
    for io in (AtomicCheckpointIO, BackgroundCheckpointIO):
        found[io.__name__] = fill_the_disk(folder / io.__name__, io)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
