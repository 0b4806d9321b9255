"""Lightning saves, loads and removes checkpoints by the protocol."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ldm.training import checkpoint_folders, checkpoint_io
from ldm.training.checkpoint_files import Damaged, StorageError, is_valid
from ldm.training.checkpoint_folders import find
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.checkpoint_parts import read
from ldm.training.checkpoints import Checkpoints
from ldm.training.strategies import fsdp


class Unsavable:
    """Fails in the middle of being pickled."""

    def __reduce__(self) -> str:
        raise RuntimeError("the disk is full")


class Linear(pl.LightningModule):
    """A layer and a number to watch, trained with momentum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def make_trainer(folder: Path, *, max_steps: int, plugins: list[Any], callbacks: list[pl.Callback]) -> pl.Trainer:
    return pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        plugins=plugins,
        callbacks=callbacks,
    )


def data() -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(100, 2)), batch_size=2)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_loads_without_unpickling_code(tmp_path: Path) -> None:
    path = tmp_path / "new" / "step=1.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1, "w": torch.arange(3)}, path)
    loaded = AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
    assert loaded["step"] == 1
    torch.testing.assert_close(loaded["w"], torch.arange(3))
    assert names(path.parent) == ["step=1.ckpt"]


def test_a_failing_save_leaves_the_old_checkpoint_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "step=1.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(RuntimeError, match="disk is full"):
        AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(10), "bad": Unsavable()}, path)
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}
    assert names(tmp_path) == ["step=1.ckpt"]


def test_the_temporary_files_lie_in_the_checkpoints_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = tmp_path / "nowhere"
    monkeypatch.setenv("TMPDIR", str(nowhere))
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "step=1.ckpt")
    assert not nowhere.exists()


def test_a_damaged_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "step=1.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.zeros(100)}}, path)
    weights = bytearray((path / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (path / "weights.safetensors").write_bytes(weights)
    with pytest.raises(Damaged, match=r"weights.safetensors is not as it was written; resume from another"):
        AtomicCheckpointIO().load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="got no checkpoint at"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "nowhere.ckpt")


def test_running_a_checkpoints_code_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights_only: got False"):
        AtomicCheckpointIO().load_checkpoint(tmp_path, weights_only=False)
    with pytest.raises(TypeError, match="storage_options: got some, expected none"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path, storage_options={"a": 1})


@pytest.mark.parametrize("written_by", [TorchCheckpointIO, AtomicCheckpointIO])
def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(written_by: type, tmp_path: Path) -> None:
    whole, begun, resumed = Linear(), Linear(), Linear()
    make_trainer(tmp_path, max_steps=9, plugins=[AtomicCheckpointIO()], callbacks=[]).fit(whole, data())
    trainer = make_trainer(tmp_path, max_steps=4, plugins=[written_by()], callbacks=[])
    trainer.fit(begun, data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = make_trainer(tmp_path, max_steps=9, plugins=[AtomicCheckpointIO()], callbacks=[])
    again.fit(resumed, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("place", ["memory://a/run", "file://{tmp_path}/run"])
def test_checkpoints_go_to_and_come_from_other_stores(place: str, tmp_path: Path) -> None:
    folder = place.format(tmp_path=tmp_path)
    trainer = make_trainer(
        tmp_path, max_steps=11, plugins=[AtomicCheckpointIO()], callbacks=[Checkpoints(folder, every_n_steps=3)]
    )
    trainer.fit(Linear(), data())
    found = find(folder)
    assert [str(path).rpartition("=")[2] for path in found] == ["000000011.ckpt", "000000009.ckpt"]
    resumed = Linear()
    again = make_trainer(tmp_path, max_steps=12, plugins=[AtomicCheckpointIO()], callbacks=[])
    again.fit(resumed, data(), ckpt_path=str(found[0]), weights_only=True)
    assert again.global_step == 12


def test_lightnings_own_callback_keeps_two_valid_ones_though_told_to_keep_one(tmp_path: Path) -> None:
    callback = pl.callbacks.ModelCheckpoint(
        tmp_path / "kept", every_n_train_steps=2, save_top_k=1, monitor="step", mode="max", save_last=True
    )
    trainer = make_trainer(tmp_path, max_steps=10, plugins=[AtomicCheckpointIO()], callbacks=[callback])
    trainer.fit(Linear(), data())
    assert names(tmp_path / "kept") == ["epoch=0-step=10.ckpt", "last.ckpt"]
    assert all(is_valid(path) for path in find(tmp_path / "kept"))
    assert read(tmp_path / "kept" / "last.ckpt")["global_step"] == 10


def test_nothing_is_removed_while_the_newer_ones_are_damaged(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    paths = [tmp_path / f"step={step}.ckpt" for step in (1, 2, 3, 4)]
    for path in paths[:3]:
        io.save_checkpoint({"step": 1}, path)
    (paths[1] / "state.pt").write_bytes(b"damaged")
    io.remove_checkpoint(paths[0])
    assert paths[0].exists()
    io.save_checkpoint({"step": 1}, paths[3])
    assert not paths[0].exists()


def test_a_full_disk_is_said_in_one_line_and_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = AtomicCheckpointIO()
    for step in (1, 2):
        io.save_checkpoint({"step": step}, tmp_path / f"step={step}.ckpt")
    usage = shutil.disk_usage(tmp_path)._replace(free=300)
    monkeypatch.setattr(checkpoint_folders.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError) as caught:
        io.save_checkpoint({"w": torch.zeros(100)}, tmp_path / "step=3.ckpt")
    message = str(caught.value)
    assert "step=3.ckpt: got 300 bytes of free disk space, expected 440 bytes; make room" in message
    assert "\n" not in message
    assert names(tmp_path) == ["step=1.ckpt", "step=2.ckpt"]
    assert all(is_valid(path) for path in find(tmp_path))


def test_a_run_does_not_start_where_two_checkpoints_have_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=30)
    monkeypatch.setattr(checkpoint_folders.shutil, "disk_usage", lambda path: usage)
    trainer = make_trainer(tmp_path, max_steps=2, plugins=[AtomicCheckpointIO()], callbacks=[Checkpoints(tmp_path)])
    with pytest.raises(StorageError, match="got 30 bytes of free disk space, expected 79 bytes"):
        trainer.fit(Linear(), data())
    assert trainer.global_step == 0


def test_a_storage_that_recovers_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle")]
    write = checkpoint_io.write

    def flaky(*args: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return write(*args, **options)

    monkeypatch.setattr(checkpoint_io, "write", flaky)
    with pytest.warns(UserWarning, match="trying again"):
        AtomicCheckpointIO(wait_seconds=0).save_checkpoint({"step": 1}, tmp_path / "step=1.ckpt")
    assert read(tmp_path / "step=1.ckpt") == {"step": 1}


def test_a_storage_that_does_not_recover_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning), pytest.raises(StorageError) as caught:
        AtomicCheckpointIO(attempts=2, wait_seconds=0).save_checkpoint({"w": torch.zeros(9)}, tmp_path / "file/a.ckpt")
    assert str(caught.value).startswith(f"a.ckpt: could not be saved to {tmp_path}/file (")
    assert "it needs 36 bytes). Earlier checkpoints are as they were" in str(caught.value)


def test_what_reads_back_otherwise_than_written_is_set_aside_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = checkpoint_io.write, [1]

    def lies(place: Path, *args: Any, **options: Any) -> Any:
        manifest = write(place, *args, **options)
        if left:
            left.pop()
            os.truncate(place / "state.pt", 10)
        return manifest

    monkeypatch.setattr(checkpoint_io, "write", lies)
    with pytest.warns(UserWarning, match="read back otherwise than written: state.pt has 10 bytes"):
        AtomicCheckpointIO(wait_seconds=0).save_checkpoint({"step": 1}, tmp_path / "step=1.ckpt")
    assert names(tmp_path) == ["step=1.ckpt", "step=1.ckpt.corrupt"]
    assert is_valid(tmp_path / "step=1.ckpt")


@pytest.mark.parametrize("options", [{"attempts": 0}, {"wait_seconds": -1.0}])
def test_settings_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected at least 1 and 0"):
        AtomicCheckpointIO(**options)


def test_fsdp_on_a_cpu_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="strategy: got fsdp on a CPU, expected GPUs"):
        pl.Trainer(accelerator="cpu", devices=2, strategy=fsdp(), logger=False)


def test_a_folder_that_vanishes_in_mid_run_is_made_again(tmp_path: Path) -> None:
    class Vanish(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 4:
                shutil.rmtree(tmp_path / "run")

    callbacks = [Vanish(), Checkpoints(tmp_path / "run", every_n_steps=3)]
    make_trainer(tmp_path, max_steps=6, plugins=[AtomicCheckpointIO()], callbacks=callbacks).fit(Linear(), data())
    assert [path.name for path in find(tmp_path / "run")] == ["step=000000006.ckpt"]
    assert is_valid(tmp_path / "run" / "step=000000006.ckpt")


def test_the_strategys_own_saving_goes_through_the_protocol(tmp_path: Path) -> None:
    strategy = SingleDeviceStrategy(checkpoint_io=AtomicCheckpointIO())
    strategy.save_checkpoint({"step": 3}, tmp_path / "a.ckpt")
    assert strategy.load_checkpoint(tmp_path / "a.ckpt", weights_only=True) == {"step": 3}
