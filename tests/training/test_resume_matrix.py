"""A run that is killed anywhere and resumed ends with the very bits, and the very metrics.csv, of one that was not."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import tiny_models
import torch
from torch import Tensor, nn

from ldm.data import ShardDataModule
from ldm.training.callbacks import SpikeGuard
from ldm.training.checkpoint_folders import newest_valid
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.checkpoint_parts import read
from ldm.training.checkpoints import Checkpoints
from ldm.training.fit import fit
from ldm.training.loggers import MetricsCSV

MODULES = {
    "ldm": tiny_models.latent_diffusion_module,
    "patches": tiny_models.patch_dropping_module,
    "kl": tiny_models.autoencoder_module,
    "vq": tiny_models.vq_autoencoder_module,
}


class Killed(BaseException):
    """As after kill -9 nothing is saved or tidied up."""


class KillAt(pl.callbacks.Checkpoint):
    """Ends everything at the n-th call of a hook; being a `Checkpoint`, behind the save of that step."""

    def __init__(self, hook: str, count: int) -> None:
        self.left = count
        setattr(self, hook, self.strike)

    def strike(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if not self.left:
            raise Killed


class Draws(pl.Callback):
    """Third-party code that draws from the global generators, and keeps what it got in the model's buffers."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        numbers = torch.tensor([random.random(), np.random.random(), torch.rand(()).item()], dtype=torch.float64)
        pl_module.drawn += numbers

    def on_validation_start(self, *_: Any) -> None:
        torch.rand(3)


def train(kind: str, folder: Path, *, colours: Path, kill: tuple[str, int] | None = None, **options: Any) -> None:
    """Twelve batches, on from the newest checkpoint; four are an epoch."""
    data_options = {"batch_size": 6, "resolution": 16, "seed": 3, "num_workers": options.pop("num_workers", 0)}
    data_options["workers"] = options.pop("workers", "threads")
    every, dropout = options.pop("every", 3), options.pop("dropout", False)
    plugins: list[Any] = [AtomicCheckpointIO()]
    if options.pop("float16", False):
        # Small enough for no overflow and growing on the way: the scale is state, too.
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
        plugins.append(pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler))
    module = MODULES[kind]()
    module.register_buffer("drawn", torch.zeros(3, dtype=torch.float64))
    if dropout:
        module.trained.denoiser.network.dropout_probe = nn.Dropout(0.5)
        clean = module.loss
        module.loss = lambda *a: clean(*a) * module.trained.denoiser.network.dropout_probe(torch.ones(())) + 0

    def trainer(*, callbacks: list[pl.Callback], logger: list[Any]) -> pl.Trainer:
        if kill:
            callbacks = [*callbacks, KillAt(*kill)]
        rest = {"enable_checkpointing": True, "log_every_n_steps": 1, "check_val_every_n_epoch": None}
        validation = {"val_check_interval": 5}
        merged = {"max_steps": 12, **rest, **validation, **options}
        return tiny_models.quiet_trainer(callbacks=callbacks, logger=logger, plugins=plugins, **merged)

    callbacks = [
        Draws(),
        SpikeGuard(folder / "skipped.jsonl", read_every=3),
        pl.callbacks.LearningRateMonitor(logging_interval="step"),
        Checkpoints(folder / "checkpoints", every_n_steps=every),
    ]
    fit(
        trainer,
        module,
        data=ShardDataModule(colours, colours, **data_options),
        config={"seed": 1},
        callbacks=callbacks,
        loggers=[MetricsCSV(folder)],
        checkpoint=newest_valid(folder / "checkpoints"),
    )


def end(folder: Path) -> dict[str, Any]:
    """The last checkpoint, less Lightning's counters of batches within a pass, which nothing reads."""
    place = newest_valid(folder / "checkpoints")
    assert place is not None
    return {name: value for name, value in read(place).items() if name != "loops"}


def assert_same_bits(first: Any, second: Any, place: str = "") -> None:
    if isinstance(first, Tensor):
        assert first.dtype == second.dtype and first.shape == second.shape, place
        assert first.numpy(force=True).tobytes() == second.numpy(force=True).tobytes(), place
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for name in first:
            assert_same_bits(first[name], second[name], f"{place}/{name}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), place
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_same_bits(*pair, f"{place}/{number}")
    else:
        assert first == second, place


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of the run that was never stopped, of a kind and with options; trained once."""
    root = tmp_path_factory.mktemp("whole")
    tiny_models.write_colours(root / "colours")
    made: dict[str, Path] = {}

    def folder(kind: str, **options: Any) -> Path:
        name = f"{kind}-{len(made)}"
        key = f"{kind} {sorted(options.items())}"
        if key not in made:
            made[key] = root / name
            train(kind, made[key], colours=root / "colours", **options)
        return made[key]

    return folder


ACCUMULATED = {"accumulate_grad_batches": 2, "max_steps": 6, "every": 2}
WHILE_SAVED = {"every": 5}
# Without a validation, whose idle workers somebody would have to wait for.
PROCESSES = {"workers": "processes", "limit_val_batches": 0}
SLOW = pytest.mark.slow
BEGIN, STEP, SAVED, VALIDATION, EPOCH = (
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_batch_start",
    "on_train_epoch_end",
)


@pytest.mark.parametrize(
    ("kind", "kill", "options"),
    [
        ("ldm", (BEGIN, 2), {}),
        ("ldm", (STEP, 8), {}),
        ("ldm", (SAVED, 6), {}),
        ("ldm", (SAVED, 12), {}),
        ("ldm", (EPOCH, 2), {}),
        ("ldm", (VALIDATION, 6), {}),
        ("ldm", (VALIDATION, 2), WHILE_SAVED),
        ("ldm", (SAVED, 10), WHILE_SAVED),
        ("ldm", (SAVED, 4), {"every": 4}),
        ("ldm", (BEGIN, 8), ACCUMULATED),
        ("ldm", (SAVED, 4), ACCUMULATED),
        ("ldm", (BEGIN, 8), {"dropout": True}),
        ("ldm", (STEP, 8), {"precision": "bf16-mixed"}),
        ("ldm", (STEP, 8), {"float16": True}),
        ("ldm", (STEP, 8), {"num_workers": 1}),
        ("ldm", (SAVED, 9), {"num_workers": 2, **PROCESSES}),
        ("patches", (BEGIN, 8), {}),
        ("patches", (STEP, 4), ACCUMULATED),
        ("kl", (STEP, 7), {}),
        ("kl", (SAVED, 6), {}),
        ("kl", (VALIDATION, 2), WHILE_SAVED),
        pytest.param("kl", (STEP, 8), {"precision": "bf16-mixed"}, marks=SLOW),
        ("kl", (STEP, 8), {"num_workers": 2}),
        ("kl", (SAVED, 9), {"num_workers": 1, **PROCESSES}),
        ("vq", (BEGIN, 8), {}),
        ("vq", (SAVED, 5), WHILE_SAVED),
    ],
    ids=str,
)
def test_killed_and_resumed_is_the_same_run(
    kind: str, kill: tuple[str, int], options: dict[str, Any], whole: Callable[..., Path], tmp_path: Path
) -> None:
    """Weights, moving average, optimizers, schedules, callbacks, place in the data, metrics.csv."""
    expected = whole(kind, **options)
    resume = partial(train, kind, tmp_path, colours=expected.parent / "colours", **options)
    with pytest.raises(Killed):
        resume(kill=kill)
    resume()
    assert_same_bits(end(expected), end(tmp_path))
    assert (tmp_path / "metrics.csv").read_text() == (expected / "metrics.csv").read_text()


def test_killed_again_and_again(whole: Callable[..., Path], tmp_path: Path) -> None:
    """Four times at the end of an epoch, each time behind a save."""
    expected = whole("kl", every=2)
    resume = partial(train, "kl", tmp_path, colours=expected.parent / "colours", every=2)
    for _ in range(3):
        with pytest.raises(Killed):
            resume(kill=(SAVED, 4))
    resume()
    assert_same_bits(end(expected), end(tmp_path))
    assert (tmp_path / "metrics.csv").read_text() == (expected / "metrics.csv").read_text()


def test_a_run_of_another_folder_leaves_its_metrics_alone(whole: Callable[..., Path], tmp_path: Path) -> None:
    """Starting from a checkpoint elsewhere writes no row that this run has not trained."""
    expected = whole("ldm")
    (tmp_path / "checkpoints").mkdir()
    (expected / "checkpoints" / "step=000000009.ckpt").rename(tmp_path / "checkpoints" / "step=000000009.ckpt")
    train("ldm", tmp_path, colours=expected.parent / "colours")
    rows = (tmp_path / "metrics.csv").read_text().splitlines()[1:]
    assert sorted({int(row.partition(",")[0]) for row in rows}) == [9, 10, 11]
