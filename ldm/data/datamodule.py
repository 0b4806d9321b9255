"""Shards for the Lightning trainer: an endless, exactly resumable training stream and an exact validation pass."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.data.dataset import Item, ShardDataset, collate
from ldm.data.position import RankBatches, ShardOrder, ShareBatches, batch_size_per_rank
from ldm.data.shards import resolve_shards
from ldm.data.worker_signals import outlive_stop

Shards = str | os.PathLike[str] | Sequence[str]


class ShardDataModule(pl.LightningDataModule):
    """Training and validation batches from shards of images or of moments.

    `batch_size` counts the samples of all processes together. The order of the samples depends on the seed and
    the position in the stream alone, so a resumed run reads exactly what an uninterrupted one would have read, with
    any number of workers or processes; the position, in samples, is the one number that a checkpoint keeps.
    A Lightning epoch is one pass over the data, rounded down to whole optimizer steps; what is left opens the next.
    """

    def __init__(
        self,
        train: Shards,
        validation: Shards | None = None,
        *,
        batch_size: int,
        resolution: int | None = None,
        columns: Sequence[str] = (),
        num_workers: int = 0,
        seed: int = 0,
        flip: bool = False,
        cache: bool = False,
        block_size: int = 16,
        filter: str | os.PathLike[str] | None = None,
    ) -> None:
        """`filter` is a folder that `ldm data filter` wrote: training reads the samples that it kept alone.

        Raises FileNotFoundError where there are no shards and ValueError for a batch that is not positive.
        """
        super().__init__()
        batch_size_per_rank(batch_size, 1)
        self.paths = {"train": resolve_shards(train)}
        if validation is not None:
            self.paths["validation"] = resolve_shards(validation)
        else:  # Lightning looks for the hook on the instance; an empty loader would run empty validations
            self.val_dataloader = None  # type: ignore[assignment, method-assign]
        self.batch_size = batch_size
        self.resolution = resolution
        self.columns = tuple(columns)
        self.num_workers = num_workers
        self.seed = seed
        self.flip = flip
        self.cache = cache
        self.block_size = block_size
        self.filter = filter
        self._datasets: dict[str, ShardDataset] = {}
        self._stream: TrainingStream | None = None
        # Where the stream stood when the trainer had done so many batches; None: as many as it has been restored to.
        self._origin_position = 0
        self._origin_batches: int | None = 0
        self._expected_fingerprint: str | None = None

    def dataset(self, split: str) -> ShardDataset:
        """Return the data set of "train" or "validation", indexing its shards on first use."""
        if split not in self.paths:
            raise ValueError(f"split: got {split!r}, expected one of {sorted(self.paths)}; set data.{split}")
        if split not in self._datasets:
            self._datasets[split] = ShardDataset(
                [os.fspath(path) for path in self.paths[split]],
                resolution=self.resolution,
                columns=self.columns,
                flip=self.flip and split == "train",
                cache=self.cache,
                seed=self.seed,
                kept=self.filter if split == "train" else None,
            )
        return self._datasets[split]

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def setup(self, stage: str) -> None:
        """Index the shards; raises ValueError where the batch does not divide among the processes."""
        batch_size_per_rank(self.batch_size, self.world_size)
        for split in self.paths:
            self.dataset(split)

    def teardown(self, stage: str) -> None:
        if self._stream is not None:
            self._stream.close()

    @property
    def position(self) -> int:
        """The number of samples, over all processes, whose optimizer steps have been taken."""
        if self._origin_batches is None:
            return self._origin_position
        return self._origin_position + (self._batches_done() - self._origin_batches) * self.batch_size

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, and which data and seed it is a position in."""
        return {"position": self.position, "fingerprint": self._fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the position up again; the batch size, workers and processes may have changed since."""
        self._origin_position = state_dict["position"]
        self._origin_batches = None
        self._expected_fingerprint = state_dict["fingerprint"]

    def train_dataloader(self) -> "TrainingStream":
        """Return the training stream; raises ValueError when resuming on other shards or another seed."""
        if self._expected_fingerprint not in (None, self._fingerprint()):
            raise ValueError(
                f"resume: got other training shards, data.filter, data.seed or data.block_size ({self._fingerprint()}) "
                f"than the checkpoint's ({self._expected_fingerprint}), expected the same; start a new run instead"
            )
        if self._origin_batches is None:
            self._origin_batches = self._batches_done()
        self._stream = TrainingStream(self)
        return self._stream

    def val_dataloader(self) -> "Passes":
        """Return this rank's share of the validation split, in as many batches as on every other rank."""
        return self._passes("validation", self.batch_size // self.world_size)

    def iterate_once(self, split: str, batch_size: int) -> Iterator[Item]:
        """Return batches of `batch_size` from this rank's share of a split: once, in order, never augmented."""
        return iter(self._passes(split, batch_size))

    def _passes(self, split: str, batch_size: int) -> "Passes":
        dataset = self.dataset(split).unaugmented()
        batches = ShareBatches(len(dataset), batch_size=batch_size, rank=self.rank, world_size=self.world_size)
        return Passes(make_loader(dataset, batches, num_workers=self.num_workers))

    def _fingerprint(self) -> str:
        return f"{self.dataset('train').fingerprint}-{self.seed}-{self.block_size}"

    def _batches_done(self) -> int:
        """Count the batches whose optimizer steps have been taken."""
        trainer = attached_trainer(self)
        if trainer.lightning_module.automatic_optimization:
            return trainer.global_step * trainer.accumulate_grad_batches
        # With manual optimisation global_step counts the steps of every optimizer.
        return int(trainer.fit_loop.epoch_loop.batch_progress.total.state_dict()["processed"])


class TrainingStream:
    """The trainer's training data: this rank's batches, from the data module's position on, without end.

    Iterating goes on where the trainer stands, so a new Lightning epoch keeps the running workers and their
    prefetched batches. Its length is a Lightning epoch's: with a length, Lightning reads no batch ahead, and as a
    multiple of the accumulated batches it never makes Lightning step on a part of them. Not being a DataLoader, it
    keeps Lightning from replacing the sampler in distributed runs.
    """

    def __init__(self, module: ShardDataModule) -> None:
        self._module = module
        self._dataset = module.dataset("train")
        self._order = ShardOrder(self._dataset.shard_sizes, seed=module.seed, block_size=module.block_size)
        self._batches: Iterator[Item] | None = None
        self._next_position = 0

    def __len__(self) -> int:
        accumulated = attached_trainer(self._module).accumulate_grad_batches
        return max(1, len(self._dataset) // (self._module.batch_size * accumulated)) * accumulated

    def __iter__(self) -> "TrainingStream":
        # Overfitting means the same first batches again in every epoch.
        position = 0 if attached_trainer(self._module).overfit_batches else self._module.position  # type: ignore[attr-defined]
        if self._batches is None or position != self._next_position:
            self._open(position)
        return self

    def __next__(self) -> Item:
        assert self._batches is not None
        batch = next(self._batches)
        self._next_position += self._module.batch_size
        return batch

    def close(self) -> None:
        """Stop the workers."""
        self._batches = None

    # Lightning warns on resuming in mid-epoch unless a loader keeps its own state; the data module keeps this one's.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        return None

    def _open(self, position: int) -> None:
        module = self._module
        batches = RankBatches(
            self._order,
            batch_size=module.batch_size,
            position=position,
            rank=module.rank,
            world_size=module.world_size,
        )
        self._batches = iter(make_loader(self._dataset, batches, num_workers=module.num_workers))
        self._next_position = position


class Passes:
    """A finite loader, hidden from Lightning, which would give a bare DataLoader a sampler that repeats samples."""

    def __init__(self, loader: DataLoader[Item]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._loader)


def attached_trainer(module: pl.LightningDataModule) -> pl.Trainer:
    assert module.trainer is not None, "only a trainer asks for these"
    return module.trainer


def make_loader(
    dataset: ShardDataset, batches: Iterable[list[tuple[int, int, int]]], *, num_workers: int
) -> DataLoader[Item]:
    """Return a loader of these batches that leaves the global random state alone."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),
        worker_init_fn=outlive_stop,
    )
