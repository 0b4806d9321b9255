"""The batches that a trainer reads: an endless stream of training batches, and passes through a split."""

import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

from torch.utils.data import DataLoader

from ldm.data.dataset import Item
from ldm.data.orders import training_order
from ldm.data.position import Order, RankBatches
from ldm.data.prefetch import Prefetch
from ldm.data.stream import ShardStream
from ldm.data.substitutes import GoodSamples, Read
from ldm.data.thread_loader import ThreadLoader
from ldm.data.worker_signals import WorkerDied, WorkerLoader, next_batch

if TYPE_CHECKING:
    from ldm.data.datamodule import ShardDataModule

# With several processes the share of bad samples is looked at so often, because they have to agree on it.
BATCHES_BETWEEN_CHECKS = 50
# How often workers that were killed start again in a run.
MAX_RESTARTS = 3
Loader = DataLoader[Read] | ThreadLoader[Read]


class TrainingStream:
    """The trainer's training data: this rank's batches, from the data module's position on, without end.

    Iterating goes on where the trainer stands, so a new Lightning epoch keeps the running workers and their
    prefetched batches. Its length is a Lightning epoch's: with a length, Lightning reads no batch ahead, and as a
    multiple of the accumulated batches it never makes Lightning step on a part of them. Not being a DataLoader, it
    keeps Lightning from replacing the sampler in distributed runs.
    """

    def __init__(self, module: "ShardDataModule") -> None:
        self._module = module
        self._dataset = module.dataset("train")
        self._order = (
            None
            if module.stream
            else training_order(
                self._dataset,
                seed=module.seed,
                block_size=module.block_size,
                batch_size=module.batch_size,
                weights=module.weights,
            )
        )
        self._batches: Iterator[Read] | None = None
        self._next_position = self._num_restarts = 0
        fetches_ahead = module.remote is not None and self._order is not None
        self._prefetch = Prefetch(self._dataset, cast(Order, self._order), module.block_size) if fetches_ahead else None

    def __len__(self) -> int:
        accumulated = attached_trainer(self._module).accumulate_grad_batches
        return max(1, len(self._dataset) // (self._module.batch_size * accumulated)) * accumulated

    def __iter__(self) -> "TrainingStream":
        # Overfitting means the same first batches again in every epoch.
        position = 0 if attached_trainer(self._module).overfit_batches else self._module.position
        if self._batches is None or position != self._next_position:
            self._open(position)
        return self

    def __next__(self) -> Item:
        assert self._batches is not None
        module = self._module
        batch = module.note(self._read(), split="train")
        self._next_position += module.batch_size
        self._check_faults()
        if self._prefetch is not None:
            self._prefetch.advance(self._next_position)
        return batch

    def _read(self) -> Read:
        """Return the next batch; workers that were killed start again at the same place, a few times in a run."""
        assert self._batches is not None
        while True:
            try:
                return next_batch(self._batches)
            except WorkerDied as error:
                if self._num_restarts == MAX_RESTARTS:
                    raise
                self._num_restarts += 1
                times = f"time {self._num_restarts} of {MAX_RESTARTS}"
                warnings.warn(f"{str(error).rstrip('. ')}; the workers start again, {times}", stacklevel=2)
                self._open(self._next_position)

    def close(self) -> None:
        """Stop the workers."""
        self._batches = None
        if self._prefetch is not None:
            self._prefetch.close()

    # Lightning warns on resuming in mid-epoch unless a loader keeps its own state; the data module keeps this one's.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        return None

    def _open(self, position: int) -> None:
        module = self._module
        self._next_position = position
        if self._order is None:
            self._batches = self._stream_from(position)
            return
        batches = RankBatches(
            self._order,
            batch_size=module.batch_size,
            position=position,
            rank=module.rank,
            world_size=module.world_size,
        )
        self._batches = iter(module._loader(self._dataset, batches, substitutes=True))
        self._next_position = position
        if self._prefetch is not None:
            self._prefetch.advance(position)

    def _stream_from(self, position: int) -> Iterator[Read]:
        module = self._module
        stream = cast(ShardStream, self._dataset)
        if position:
            message = (
                "data.mode=stream goes on with other samples than an uninterrupted run: the same in statistics alone"
            )
            warnings.warn(message, stacklevel=2)
        return stream.batches(
            position,
            batch_size=module.batch_size,
            rank=module.rank,
            world_size=module.world_size,
            num_workers=module.num_workers,
        )

    def _check_faults(self) -> None:
        """Stop training where too many samples were bad: on all ranks at the same batch, so that none waits."""
        module, trainer = self._module, attached_trainer(self._module)
        if module.world_size > 1 and self._next_position // module.batch_size % BATCHES_BETWEEN_CHECKS:
            return
        if module.world_size > 1:
            module.ledger.refresh()
        num_read, num_samples = self._next_position, len(self._dataset)
        too_bad = module.ledger.is_too_bad(num_read=num_read, num_samples=num_samples)
        if module.world_size > 1:
            too_bad = trainer.strategy.reduce_boolean_decision(too_bad, all=False)
            module.ledger.refresh()  # by now everybody has written what decided
        if too_bad:
            raise module.ledger.error(num_read=num_read, num_samples=num_samples)


class Passes:
    """A finite loader, hidden from Lightning, which would give a bare DataLoader a sampler that repeats samples."""

    def __init__(self, module: "ShardDataModule", split: str, loader: Loader) -> None:
        self._module = module
        self._split = split
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Item]:
        for read in self._loader:
            yield self._module.note(read, split=self._split)


def attached_trainer(module: "ShardDataModule") -> Any:
    """Return the data module's `pytorch_lightning.Trainer`."""
    assert module.trainer is not None, "only a trainer asks for these"
    return module.trainer


def make_loader(
    dataset: GoodSamples, batches: Iterable[list[tuple[int, int, int]]], *, num_workers: int
) -> DataLoader[Read]:
    """Return a loader of these batches that leaves the global random state alone."""
    return WorkerLoader(
        dataset,  # whose items are never asked for one by one
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_read,
        persistent_workers=num_workers > 0,
    )


def _as_read(read: Any) -> Any:
    return read
