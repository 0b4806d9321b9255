"""Trains in two processes that hold a shard each, and once more from a checkpoint on the way.

Usage: sharded_worker.py FOLDER; Lightning starts this file once more for the second process.
"""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.checkpoint_sharded import SealsShards
from ldm.training.checkpoints import Checkpoints
from ldm.training.fit import leave_group


class Sealed(SealsShards, ModelParallelStrategy):
    """FSDP's second version, which runs on CPUs as well."""


class Two(pl.LightningModule):
    """Two layers, a shard of each on either process."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 2)

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for layer in (self.first, self.second):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        return self.second(self.first(batch[0])).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def train(folder: Path, checkpoint: Path | None = None) -> dict[str, Tensor]:
    """The weights after five steps, from the start or from a checkpoint."""
    module = Two()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=Sealed(
            data_parallel_size=2,
            tensor_parallel_size=1,
            save_distributed_checkpoint=True,
            process_group_backend="gloo",
        ),
        plugins=[AtomicCheckpointIO()],
        max_steps=5,
        logger=False,
        callbacks=[Checkpoints(folder / "checkpoints", every_n_steps=2)],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader = DataLoader(TensorDataset(torch.ones(40, 8)), batch_size=4)
    trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    return {name: value.full_tensor().detach() for name, value in module.state_dict().items()}


def main() -> None:
    folder = Path(sys.argv[1])
    straight = train(folder)
    resumed = train(folder, folder / "checkpoints" / "step=000000004.ckpt")
    torch.save({"straight": straight, "resumed": resumed}, folder / f"rank{torch.distributed.get_rank()}.pt")
    leave_group()


if __name__ == "__main__":
    main()
