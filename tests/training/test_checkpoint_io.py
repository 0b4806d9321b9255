"""A checkpoint file is the old one or the new one, whatever happens while it is written."""

import os
from pathlib import Path

import pytest
import torch

from ldm.training.checkpoint_io import AtomicCheckpointIO


class Unsavable:
    """Fails in the middle of being pickled."""

    def __reduce__(self) -> str:
        raise RuntimeError("the disk is full")


def test_what_is_saved_loads_without_unpickling_code(tmp_path: Path) -> None:
    path = tmp_path / "new" / "step=1.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1, "w": torch.arange(3)}, path)
    loaded = AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
    assert loaded["step"] == 1
    torch.testing.assert_close(loaded["w"], torch.arange(3))
    assert [file.name for file in path.parent.iterdir()] == ["step=1.ckpt"]


def test_a_failing_save_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "step=1.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(RuntimeError, match="disk is full"):
        AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(10), "bad": Unsavable()}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["step=1.ckpt"]


def test_the_temporary_file_lies_in_the_checkpoints_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = tmp_path / "nowhere"
    monkeypatch.setenv("TMPDIR", str(nowhere))
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "step=1.ckpt")
    assert not nowhere.exists()


def test_a_process_killed_while_saving_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "step=1.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    child = os.fork()
    if child == 0:
        torch.save = lambda checkpoint, file: (file.write(b"half"), file.flush(), os._exit(9))
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    os.waitpid(child, 0)
    assert torch.load(path, weights_only=True) == {"step": 1}
