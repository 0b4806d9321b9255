"""Saving in the background: of a copy, one at a time, and a failure is known within a step."""

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ldm.training import checkpoint_io
from ldm.training.checkpoint_background import BackgroundCheckpointIO
from ldm.training.checkpoint_files import StorageError, is_valid
from ldm.training.checkpoint_folders import find
from ldm.training.checkpoint_parts import read
from ldm.training.checkpoints import Checkpoints

Write = Callable[..., Any]


class Slow(pl.LightningModule):
    """Notes its weight after each step, which takes a fiftieth of a second."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.weights: dict[int, Tensor] = {}

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        time.sleep(0.02)
        return self.layer(batch[0]).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        self.weights[self.trainer.global_step] = self.layer.weight.detach().clone()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder: Path, *, max_steps: int) -> Slow:
    model = Slow()
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Checkpoints(folder, every_n_steps=4)],
        plugins=[BackgroundCheckpointIO()],
    )
    try:
        trainer.fit(model, DataLoader(TensorDataset(torch.ones(100, 2)), batch_size=2))
    except StorageError as error:
        model.error = error  # type: ignore[assignment]
    return model


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def slowed(write: Write, seconds: float) -> Write:
    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return write(*args, **options)

    return slow


def test_a_checkpoint_holds_the_step_it_is_named_after_though_training_went_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_io, "write", slowed(checkpoint_io.write, 0.05))
    model = train(tmp_path, max_steps=10)
    assert names(tmp_path) == ["step=000000008.ckpt", "step=000000010.ckpt"]
    for step in (8, 10):
        saved = read(tmp_path / f"step={step:09d}.ckpt")
        assert saved["global_step"] == step
        assert torch.equal(saved["state_dict"]["layer.weight"], model.weights[step])


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, let_go = checkpoint_io.write, threading.Event()
    monkeypatch.setattr(checkpoint_io, "write", lambda *args, **options: (let_go.wait(), write(*args, **options))[1])
    io = BackgroundCheckpointIO()
    weight = torch.zeros(3)
    io.save_checkpoint({"w": weight}, tmp_path / "a.ckpt")
    weight.add_(1)
    io.poll()
    assert names(tmp_path) == []
    let_go.set()
    io.join()
    assert read(tmp_path / "a.ckpt")["w"].sum() == 0
    io.teardown()


def test_at_most_one_save_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_io, "write", slowed(checkpoint_io.write, 0.1))
    io = BackgroundCheckpointIO()
    for number in (1, 2):
        io.save_checkpoint({}, tmp_path / f"{number}.ckpt")
    assert names(tmp_path) == ["1.ckpt"]
    io.teardown()
    assert names(tmp_path) == ["1.ckpt", "2.ckpt"]


def test_a_failure_stops_training_within_one_step_and_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint_io.write

    def full(place: Path, *args: Any, **options: Any) -> Any:
        if "012" in place.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(place, *args, **options)

    monkeypatch.setattr(checkpoint_io, "write", full)
    model = train(tmp_path, max_steps=40)
    assert max(model.weights) <= 13
    assert "step=000000012.ckpt: could not be saved" in str(model.error)
    assert "No space left on device" in str(model.error)
    assert names(tmp_path) == ["step=000000004.ckpt", "step=000000008.ckpt"]
    assert all(is_valid(path) for path in find(tmp_path))


def test_a_failure_of_the_last_save_is_raised_before_training_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(place: Path, *args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_io, "write", fail)
    assert "step=000000003.ckpt" in str(train(tmp_path, max_steps=3).error)


def test_an_error_is_raised_once_and_nothing_is_removed_until_a_save_succeeds_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = BackgroundCheckpointIO()
    for number in (1, 2, 3):
        io.save_checkpoint({}, tmp_path / f"{number}.ckpt")
    io.join()

    def fail(place: Path, *args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_io, "write", fail)
    io.save_checkpoint({}, tmp_path / "4.ckpt")
    io.remove_checkpoint(tmp_path / "1.ckpt")
    with pytest.raises(StorageError, match="No space left on device"):
        io.join()
    io.join()
    assert names(tmp_path) == ["1.ckpt", "2.ckpt", "3.ckpt"]
    monkeypatch.undo()
    io.save_checkpoint({}, tmp_path / "5.ckpt")
    io.teardown()
    assert names(tmp_path) == ["2.ckpt", "3.ckpt", "5.ckpt"]


def test_an_exception_of_training_is_not_hidden_by_one_of_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(place: Path, *args: Any, **options: Any) -> Any:
        time.sleep(0.2)
        raise OSError(errno.ENOSPC, "No space left on device")

    def wrong(self: Slow, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 5:
            raise RuntimeError("training went wrong")
        return self.layer(batch[0]).square().mean()

    monkeypatch.setattr(checkpoint_io, "write", fail)
    monkeypatch.setattr(Slow, "training_step", wrong)
    with pytest.raises(RuntimeError, match="training went wrong") as caught:
        train(tmp_path, max_steps=9)
    assert "while the last checkpoint was saved: step=000000004.ckpt" in caught.value.__notes__[0]
