"""Shards for the Lightning trainer: an endless, exactly resumable training stream and an exact validation pass."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl

from ldm.data.augmentation import Augmentation
from ldm.data.batches import assemble, to_numbers
from ldm.data.buckets import Buckets
from ldm.data.changes import record, refuse
from ldm.data.content import Derived
from ldm.data.dataset import Item, ShardDataset
from ldm.data.decoding import TEXT_DECODERS
from ldm.data.indices import HELD_SAMPLES
from ldm.data.ledger import Ledger
from ldm.data.orders import check_weights
from ldm.data.position import ShareBatches, batch_size_per_rank
from ldm.data.remote import ShardCache, names_urls
from ldm.data.shards import resolve_shards
from ldm.data.stream import ShardStream, StreamSettings, find_sources
from ldm.data.stream_sources import is_pipe
from ldm.data.substitutes import GoodSamples, Read
from ldm.data.thread_loader import ThreadLoader
from ldm.data.training_stream import Loader, Passes, TrainingStream, attached_trainer, make_loader

Shards = str | os.PathLike[str] | Sequence[str]
# One set, or several by name.
Sets = Shards | Mapping[str, Shards]
# What settings choose between.
WORDS = {
    "missing_caption": ("empty", "skip"),
    "bad_text": tuple(TEXT_DECODERS),
    "bad_shards": ("refuse", "skip"),
    "workers": ("threads", "processes"),
    "mode": ("indexed", "stream"),
}


class ShardDataModule(pl.LightningDataModule):
    """Training and validation batches from shards of images or of moments.

    `batch_size` counts the samples of all processes together. The order of the samples depends on the seed and
    the position in the stream alone, so a resumed run reads exactly what an uninterrupted one would have read, with
    any number of workers or processes; the position, in samples, is the one number that a checkpoint keeps.
    A Lightning epoch is one pass over the data, rounded down to whole optimizer steps; what is left opens the next.

    Args of what is read, and in which order:

        train: a folder, a tar, a brace expression, a glob, a URL, a list of these; or several sets by name.
        weights: of several sets: each passes through epochs of its own.
        filter: a folder that `ldm data filter` wrote: training reads the samples that it kept alone.
        block_size: shards that are shuffled together.
        buckets: the sizes of training batches, each of one size; validation is at `resolution`.
        remote: keeps copies of shards that are named by URL.
        mode: "indexed", or "stream" for pipes and sets without an index, which resumes statistically alone.
        stream: how a stream is read.
        allow_change: on resuming, go on with shards that are not the checkpoint's, and warn of what changed.

    Args of what a sample becomes:

        resolution: pixels that the short side is scaled to; None for moments.
        columns: of the json, in any case, whose numbers are part of a batch.
        flip: mirror at random.
        augmentation: what else is done to training pictures.
        derive: what is made of a picture besides itself: a mask, a smaller picture, boxes.
        captions: weights by column of the json, or `txt` for the .txt: one is drawn for every sample and epoch.
        exact_decoding: decode every pixel; else JPEGs of twice the size needed, or more, are decoded at a half.
        cache: keep decoded samples in memory.
        workers: "threads" of the process that trains, or "processes"; `num_workers` of them.

    Args of what others wrote badly:

        max_bad_fraction: of the samples; with more bad ones training stops and names the worst shards.
        missing_caption: "empty", or "skip" to leave such samples out.
        bad_text: "skip" samples whose text or json cannot be read, or "replace" what is not UTF-8 and do without
            a json that is none.
        bad_shards: "refuse" to start with shards that are no whole tar, or "skip" them, however many.
        run_folder: where bad_samples.jsonl goes.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: a setting that cannot be.
    """

    def __init__(
        self,
        train: Sets,
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
        max_bad_fraction: float = 0.01,
        missing_caption: str = "empty",
        bad_text: str = "skip",
        bad_shards: str = "refuse",
        run_folder: str | os.PathLike[str] | None = None,
        remote: ShardCache | None = None,
        mode: str = "indexed",
        stream: StreamSettings | None = None,
        weights: Mapping[str, float] | None = None,
        augmentation: Augmentation | None = None,
        derive: Derived | None = None,
        buckets: Buckets | None = None,
        captions: Mapping[str, float] | None = None,
        exact_decoding: bool = True,
        workers: str = "threads",
        allow_change: bool = False,
    ) -> None:
        super().__init__()
        _check_numbers(batch_size=batch_size, num_workers=num_workers)
        _check_words(missing_caption=missing_caption, bad_text=bad_text, bad_shards=bad_shards, workers=workers)
        self.stream = _checked_stream(mode, stream, train, cache=cache, filter=filter, weights=weights, buckets=buckets)
        check_weights(train, weights)
        self.batch_size, self.num_workers, self.workers = batch_size, num_workers, workers
        self.seed, self.block_size, self.allow_change = seed, block_size, allow_change
        self.filter, self.buckets, self.cache = filter, buckets, cache
        self.resolution, self.columns, self.flip = resolution, tuple(columns), flip
        self.augmentation, self.derive = augmentation or Augmentation(), derive
        self.captions, self.exact_decoding = captions, exact_decoding
        self.missing_caption, self.bad_text, self.bad_shards = missing_caption, bad_text, bad_shards
        self.ledger = Ledger(run_folder, max_bad_fraction=max_bad_fraction)
        self._locate(train, validation, remote)
        self.weights = {name: weights[name] for name in self.sets} if weights and self.sets else None
        self._datasets: dict[str, ShardDataset] = {}
        self._stream: TrainingStream | None = None
        # Where the stream stood when the trainer had done so many batches; None: as many as it has been restored to.
        self._origin_position = 0
        self._origin_batches: int | None = 0
        self._expected: dict[str, Any] | None = None

    def _locate(self, train: Sets, validation: Shards | None, remote: ShardCache | None) -> None:
        """Find the shards of both splits: their `paths`, those of several `sets` by name, the `sources` of a stream."""
        named = [*_sets_of(train).values(), *([validation] if validation is not None else [])]
        self.remote = remote if any(map(names_urls, named)) else None
        locate = self.remote.locate if self.remote else resolve_shards
        self.sets: dict[str, list[Path]] | None = None
        self.sources: list[str] = []
        if self.stream is not None:
            self.sources = find_sources(cast(Shards, train), settings=self.stream, locate=locate)
            self.paths = {"train": [Path(source) for source in self.sources if not is_pipe(source)]}
        else:
            found = {name: locate(part) for name, part in _sets_of(train).items()}
            self.sets = found if isinstance(train, Mapping) else None
            self.paths = {"train": [path for part in found.values() for path in part]}
        if validation is not None:
            self.paths["validation"] = locate(validation)
        else:  # Lightning looks for the hook on the instance; an empty loader would run empty validations
            self.val_dataloader = None  # type: ignore[assignment, method-assign]

    def dataset(self, split: str) -> ShardDataset:
        """Return the data set of "train" or "validation", indexing its shards on first use."""
        if split not in self.paths:
            raise ValueError(f"split: got {split!r}, expected one of {sorted(self.paths)}; set data.{split}")
        if split not in self._datasets:
            is_training, sets = split == "train", self.sets if split == "train" else None
            paths = [os.fspath(path) for path in self.paths[split]]
            if is_training and self.stream is not None:
                self._datasets[split] = self._open_stream()  # type: ignore[assignment]  # alike as far as is asked for
                return self._datasets[split]
            self._datasets[split] = ShardDataset(
                {name: [os.fspath(path) for path in part] for name, part in sets.items()} if sets else paths,
                resolution=self.resolution,
                columns=self.columns,
                flip=self.flip and is_training,
                cache=self.cache,
                seed=self.seed,
                kept=self.filter if split == "train" else None,
                bad_text=self.bad_text,
                bad_shards=self.bad_shards,
                remote=self.remote,
                augmentation=self.augmentation,
                derive=self.derive,
                buckets=self.buckets if is_training else None,
                captions=self.captions,
                exact_decoding=self.exact_decoding,
            )
            self._note_index_faults(split)
        return self._datasets[split]

    def _open_stream(self) -> ShardStream:
        assert self.stream is not None
        return ShardStream(
            self.sources,
            settings=self.stream,
            cache=self.remote,
            seed=self.seed,
            missing_caption=self.missing_caption,
            bad_shards=self.bad_shards,
            assemble=assemble,
            resolution=self.resolution,
            columns=self.columns,
            flip=self.flip,
            bad_text=self.bad_text,
            augmentation=self.augmentation,
            derive=self.derive,
            captions=self.captions,
            exact_decoding=self.exact_decoding,
        )

    def places(self, split: str) -> list[str]:
        """Return the folders, or the URLs of folders, in which the shards of a split lie."""
        names = [self._name(os.fspath(path.absolute())) for path in self.paths[split]]
        return list(dict.fromkeys(name.rpartition("/")[0] for name in names)) or ["pipe://"]

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
        if stage == "fit" and self.batch_size > len(self.dataset("train")):
            told = f"data.batch_size: got {self.batch_size} for {len(self.dataset('train'))} training samples"
            warnings.warn(f"{told}, so that a batch holds samples more than once", stacklevel=2)
        if (unstored := self.dataset("train").shards.num_unstored) > HELD_SAMPLES:
            told = f"data.train: {unstored:,} samples have no index beside their shards"
            spared = "spares every start the scan of all headers, and every process some 100 MB a million samples"
            warnings.warn(f"{told}; `ldm data index shards=...`, once, {spared}", stacklevel=2)

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
        return {"position": self.position, "fingerprint": self._fingerprint(), "record": self._record}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the position up again; the batch size, workers and processes may have changed since."""
        self._origin_position = state_dict["position"]
        self._origin_batches = None
        self._expected = state_dict

    def train_dataloader(self) -> "TrainingStream":
        """Return the training stream; raises ValueError when resuming on other shards or another seed."""
        if self._expected is not None:
            refuse(self._expected.get("record", {}), self._record, allowed=self.allow_change)
        if self._origin_batches is None:
            self._origin_batches = self._batches_done()
            if self.buckets is not None:  # a batch of another size than before begins where batches of this size do
                self._origin_position = -(-self._origin_position // self.batch_size) * self.batch_size
        if self._stream is not None:
            self._stream.close()
        self._stream = TrainingStream(self)
        return self._stream

    def val_dataloader(self) -> "Passes":
        """Return this rank's share of the validation split, in as many batches as on every other rank."""
        return self._passes("validation", self.batch_size // self.world_size)

    def iterate_once(self, split: str, batch_size: int) -> Iterator[Item]:
        """Return batches of `batch_size` from this rank's share of a split: once, in order, never augmented."""
        if split == "train" and self.stream is not None:
            return map(self._to_numbers, self._stream_once(batch_size))
        return map(self._to_numbers, self._passes(split, batch_size))

    def _stream_once(self, batch_size: int) -> Iterator[Item]:
        """Yield as many batches of the stream as an epoch has."""
        world = batch_size * self.world_size
        stream = self._open_stream().batches(
            0, batch_size=world, rank=self.rank, world_size=self.world_size, num_workers=self.num_workers
        )
        for read in islice(stream, max(1, len(self.dataset("train")) // world)):
            yield self.note(read, split="train")

    def on_after_batch_transfer(self, batch: Item, dataloader_idx: int) -> Item:
        """Turn bytes into numbers, which is done on the device: a quarter as much has to get there."""
        return self._to_numbers(batch)

    def _to_numbers(self, batch: Item) -> Item:
        return to_numbers(batch, colour_space=self.augmentation.colour_space)

    def _passes(self, split: str, batch_size: int) -> "Passes":
        dataset = self.dataset(split).unaugmented()
        batches = ShareBatches(len(dataset), batch_size=batch_size, rank=self.rank, world_size=self.world_size)
        return Passes(self, split, self._loader(dataset, batches, substitutes=False))

    def _loader(
        self, dataset: ShardDataset, batches: Iterable[list[tuple[int, int, int]]], *, substitutes: bool
    ) -> Loader:
        good = GoodSamples(dataset, substitutes=substitutes, missing_caption=self.missing_caption, assemble=assemble)
        if self.num_workers and self.workers == "threads":
            return ThreadLoader(good, batches, num_threads=self.num_workers)
        return make_loader(good, batches, num_workers=self.num_workers)

    def note(self, read: Read, *, split: str) -> Item:
        """Enter the faults of what a loader read into the ledger and return its batch; raises what it failed with."""
        for position, fault in read.faults:
            self.ledger.add([fault], split=split, position=position)
        if read.failure is not None:
            raise read.failure
        assert read.batch is not None
        return read.batch

    def _note_index_faults(self, split: str) -> None:
        """Enter what indexing found into the ledger."""
        named = (replace(fault, shard=self._name(fault.shard)) for fault in self._datasets[split].index_faults)
        self.ledger.add(named, split=split)

    def _name(self, shard: str) -> str:
        return self.remote.url(Path(shard)) if self.remote else shard

    def _fingerprint(self) -> str:
        parts: list[object] = [self.dataset("train").fingerprint, self.seed, self.block_size]
        if self.weights is not None:
            parts.append(list(self.weights.items()))
        if self.buckets is not None:  # whose batches depend on their size
            parts.append((self.buckets.sizes, self.batch_size))
        return "-".join(map(str, parts))

    @cached_property
    def _record(self) -> dict[str, Any]:
        """What names a change of the data later."""
        settings = {f"data.{name}": getattr(self, name) for name in ("seed", "block_size", "weights")}
        if self.sets is not None:
            settings["shards of data.train's sets"] = self.dataset("train").group_sizes
        if self.buckets is not None:
            settings["data.buckets"] = (self.buckets.sizes, self.batch_size)
        if self.filter is not None:
            settings["data.filter's choice"] = self.dataset("train").fingerprint
        return record(self.dataset("train"), settings)

    def _batches_done(self) -> int:
        """Count the batches whose optimizer steps have been taken."""
        trainer = attached_trainer(self)
        if trainer.lightning_module.automatic_optimization:
            return trainer.global_step * trainer.accumulate_grad_batches
        # With manual optimisation global_step counts the steps of every optimizer.
        return int(trainer.fit_loop.epoch_loop.batch_progress.total.state_dict()["processed"])


def _sets_of(train: Sets) -> Mapping[str, Shards]:
    return train if isinstance(train, Mapping) else {"": train}


def _check_numbers(*, batch_size: int, num_workers: int) -> None:
    batch_size_per_rank(batch_size, 1)
    if num_workers < 0:
        raise ValueError(f"data.num_workers: got {num_workers}, expected 0 or more")


def _check_words(**chosen: str) -> None:
    """Raise ValueError for a setting, by name, whose word is none of WORDS."""
    for name, word in chosen.items():
        if word not in WORDS[name]:
            raise ValueError(f"data.{name}: got {word!r}, expected {' or '.join(WORDS[name])}")


def _checked_stream(
    mode: str, stream: StreamSettings | None, train: object, **of_an_index: object
) -> StreamSettings | None:
    """Return how a stream is read where that is the mode.

    Raises ValueError for a stream without settings, and for settings that need an index.
    """
    _check_words(mode=mode)
    if mode == "indexed":
        return None
    if stream is None:
        raise ValueError("data.stream: got null, expected its settings, as data=stream has them")
    wrong = [name for name, value in of_an_index.items() if value]
    if wrong or isinstance(train, Mapping):
        name = (wrong or ["train"])[0]
        raise ValueError(f"data.{name}: got a setting that needs an index, expected data.mode=indexed with it")
    return stream
