"""When checkpoints are saved and which stay."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.checkpoints import Checkpoints


class TwoOptimizers(pl.LightningModule):
    """Takes two optimizer steps a batch, as a generator and its discriminator do."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch[0]).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]


class OneOptimizer(pl.LightningModule):
    """Automatic optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(
    model: pl.LightningModule, folder: Path, *, max_steps: int, every: int, keep: int, accumulate: int = 1
) -> list[int]:
    """The steps that were saved and kept."""
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        default_root_dir=folder,
        callbacks=[Checkpoints(folder, every_n_steps=every, keep=keep)],
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(model, DataLoader(TensorDataset(torch.ones(100, 2)), batch_size=2))
    return sorted(int(path.stem.removeprefix("step=")) for path in folder.glob("*.ckpt"))


def test_the_newest_stay_and_the_end_is_saved(tmp_path: Path) -> None:
    assert train(OneOptimizer(), tmp_path, max_steps=11, every=3, keep=3) == [6, 9, 11]


def test_an_end_on_the_beat_is_saved_once(tmp_path: Path) -> None:
    assert train(OneOptimizer(), tmp_path, max_steps=9, every=3, keep=5) == [3, 6, 9]


def test_accumulated_batches_count_as_one_step(tmp_path: Path) -> None:
    assert train(OneOptimizer(), tmp_path, max_steps=4, every=2, keep=5, accumulate=3) == [2, 4]


def test_two_optimizers_that_pass_a_beat_between_them_are_saved(tmp_path: Path) -> None:
    assert train(TwoOptimizers(), tmp_path, max_steps=12, every=5, keep=5) == [6, 10, 12]


@pytest.mark.parametrize(("setting", "least"), [("every_n_steps", 1), ("keep", 2)])
def test_a_count_that_is_too_small_is_refused(setting: str, least: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{setting}: got {least - 1}, expected at least {least}"):
        Checkpoints(tmp_path, **{setting: least - 1})
