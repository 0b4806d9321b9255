"""A checkpoint of another model is refused in one line, from its headers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.compatibility import refuse_other_model, shapes_of


class Stack(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))


@pytest.fixture
def save(tmp_path: Path) -> Callable[[nn.Module], Path]:
    def write(module: nn.Module) -> Path:
        place = tmp_path / "step=1.ckpt"
        AtomicCheckpointIO().save_checkpoint({"state_dict": module.state_dict(), "global_step": 1}, place)
        return place

    return write


def test_the_same_architecture_passes(save: Callable[[nn.Module], Path]) -> None:
    refuse_other_model(Stack(4, 2), save(Stack(4, 2)))


def test_another_width_names_the_first_five_tensors_in_one_line(save: Callable[[nn.Module], Path]) -> None:
    place = save(Stack(4, 8))
    with pytest.raises(ValueError, match=r"^resume: got .*step=1\.ckpt, a checkpoint of another model") as caught:
        refuse_other_model(Stack(6, 8), place)
    line = str(caught.value)
    assert "of 16 tensors 16 of another size (layers.0.weight (4, 4) there, (6, 6) here; layers.0.bias" in line
    assert line.count(" there, ") == 5
    assert "\n" not in line and len(line) < 500


def test_missing_and_unknown_tensors_are_told_apart(save: Callable[[nn.Module], Path]) -> None:
    place = save(Stack(4, 2))
    with pytest.raises(ValueError, match=r"of 6 tensors 2 missing \(layers\.2\.weight missing there"):
        refuse_other_model(Stack(4, 3), place)
    with pytest.raises(ValueError, match=r"of 2 tensors 2 of no use here \(layers\.1\.bias unknown here"):
        refuse_other_model(Stack(4, 1), place)


def test_single_files_of_the_former_format_are_read_too(tmp_path: Path) -> None:
    torch.save({"state_dict": Stack(4, 1).state_dict()}, tmp_path / "old.ckpt")
    assert shapes_of(tmp_path / "old.ckpt") == {"layers.0.weight": (4, 4), "layers.0.bias": (4,)}


def test_what_is_frozen_is_in_no_checkpoint_and_not_missed(
    make_latent_diffusion: Callable[..., pl.LightningModule], tmp_path: Path
) -> None:
    module = make_latent_diffusion()
    checkpoint = {"state_dict": module.state_dict(), "global_step": 1}
    module.on_save_checkpoint(checkpoint)
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "step=1.ckpt")
    assert not any(name.startswith("autoencoder") for name in shapes_of(tmp_path / "step=1.ckpt"))
    refuse_other_model(module, tmp_path / "step=1.ckpt")
