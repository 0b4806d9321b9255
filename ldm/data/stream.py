"""`data.mode=stream`: shards drawn at random and read front to back, for pipes and for sets without an index.

Resuming is statistical: a run that goes on draws other shards from there on than an uninterrupted one would have,
neither the same samples nor each once. `data.mode=indexed` is exact.
"""

import os
import random
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ldm.data.dataset import Item, ShardDataset
from ldm.data.decoding import IMAGE_SUFFIXES, CorruptSampleError, UnreachableError
from ldm.data.faults import KINDS, Fault
from ldm.data.indices import ShardIndices
from ldm.data.ledger import BadDataError
from ldm.data.remote import ShardCache
from ldm.data.stream_sources import RawSample, file_samples, is_pipe, no_sample, pipe_samples
from ldm.data.substitutes import Read
from ldm.data.worker_signals import WorkerLoader

# How many bad samples in a row, or shards without a good one, end a stream.
MAX_BAD_IN_A_ROW = 256


@dataclass(frozen=True)
class StreamSettings:
    """How a stream is read.

    Args:
        epoch_samples: samples of a Lightning epoch, over all processes; a stream has no end of its own.
        shuffle_buffer: samples that each worker holds to draw from.
        allow_pipe: whether `pipe:command`, which a shell runs, may be among the shards.
        stall: seconds for which a pipe may be silent.
    """

    epoch_samples: int
    shuffle_buffer: int = 2000
    allow_pipe: bool = False
    stall: float = 60.0

    def __post_init__(self) -> None:
        if self.epoch_samples < 1 or self.shuffle_buffer < 1 or self.stall <= 0:
            raise ValueError(f"data.stream: got {self}, expected positive numbers")


def find_sources(
    shards: str | os.PathLike[str] | Sequence[str], *, settings: StreamSettings, locate: Callable[..., list[Path]]
) -> list[str]:
    """Return the places of shards, `pipe:` commands as they are; raises ValueError for a pipe that is not allowed."""
    sources: list[str] = []
    for text in [os.fspath(shards)] if isinstance(shards, str | os.PathLike) else shards:
        if not is_pipe(text):
            sources += map(str, locate(text))
        elif settings.allow_pipe:
            sources.append(text)
        else:
            raise ValueError(
                f"shards: got {text}, a command that a shell would run; set data.stream.allow_pipe=true if you trust it"
            )
    return sources


class StreamedSample(ShardDataset):
    """A data set of the one sample that is held at the moment, read as those of shards are."""

    def __init__(self, first: RawSample, **options: Any) -> None:
        self._raw = first
        super().__init__([first.shard], **options)

    def hold(self, raw: RawSample, *, position: int, epoch: int) -> Item:
        """Return the item of another sample; raises CorruptSampleError for a bad one."""
        if not raw.members.keys() & set(IMAGE_SUFFIXES if self.payload == "image" else ("npy",)):
            reason = f"got {sorted(raw.members)}, expected an image or moments, as in the first sample"
            raise CorruptSampleError(f"{raw.shard}: {raw.key}: {reason}", kind="no_image", reason=reason)
        self._raw = raw
        self.shards.replace(0, raw.index)
        number = zlib.crc32(f"{raw.shard}\n{raw.key}".encode(errors="surrogateescape"))
        return self.read((position, number, epoch))

    def _open(self, shards: Any, **_: Any) -> None:
        self.shards.append(self._raw.index)
        self.group_sizes = [1]

    def _locate(self, index: int) -> tuple[int, int]:
        return 0, 0

    @property
    def _reader(self) -> Any:
        return self._raw


class ShardStream:
    """What the data module has instead of a data set where `data.mode` is stream."""

    def __init__(
        self,
        sources: Sequence[str],
        *,
        settings: StreamSettings,
        cache: ShardCache | None,
        seed: int,
        missing_caption: str,
        bad_shards: str,
        assemble: Callable[[Iterator[Item], int], Item],
        **options: Any,
    ) -> None:
        """`options` are those of `ShardDataset`. Raises ValueError where the first shards have no good sample."""
        self.sources = list(sources)
        self.settings = settings
        self.cache = cache
        self.seed = seed
        self.missing_caption = missing_caption
        self.bad_shards = bad_shards
        self.assemble = assemble
        self.index_faults: list[Fault] = []
        self.shards = ShardIndices()  # which a checkpoint would compare
        first = next((raw for source in self.sources for raw in self._samples(source, self.check)), None)
        if first is None:
            raise no_sample(self.sources[0])
        self.sample = StreamedSample(first, seed=seed, **options)
        self.encoder_sha256, self.payload = self.sample.encoder_sha256, self.sample.payload
        self.text_sha256 = self.sample.text_sha256

    def __len__(self) -> int:
        return self.settings.epoch_samples

    @property
    def fingerprint(self) -> str:
        """Say that a place in a stream means nothing but itself, whatever the shards."""
        return "stream"

    def check(self, fault: Fault) -> None:
        """Raise BadDataError for a shard that is no whole tar, unless such shards are to be skipped."""
        if self.bad_shards == "refuse" and KINDS[fault.kind].outcome == "refused":
            told = f"{fault.shard}: {fault.kind} ({fault.reason})"
            raise BadDataError(f"{told}; write the shard again, or set data.bad_shards=skip to read past such shards")

    def batches(
        self, position: int, *, batch_size: int, rank: int, world_size: int, num_workers: int
    ) -> Iterator[Read]:
        """Yield this rank's part of the batches without end; where they start decides what is drawn.

        A batch's places in the run's stream are given here, so that they are the same with any number of workers.
        """
        per_rank = batch_size // world_size
        worker = _Batches(self, per_rank, (self.seed, position, rank), step=batch_size)
        loader: WorkerLoader[Read] = WorkerLoader(
            worker, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is
        )
        start = position + rank * per_rank
        for read in loader:
            if read.batch is not None:
                read.batch["position"] = torch.arange(start, start + per_rank)
            yield Read(read.batch, [(start, fault) for _, fault in read.faults], read.failure)
            start += batch_size

    def raw_samples(self, draws: Sequence[int], note: Callable[[Fault], None]) -> Iterator[RawSample]:
        """Yield samples without end through webdataset's pipeline: shards drawn with replacement, a shuffle buffer."""
        wds = secure_webdataset()
        seed = int.from_bytes(blake2b(repr(tuple(draws)).encode(), digest_size=4).digest(), "little")

        def expand(drawn: Iterator[dict[str, str]]) -> Iterator[RawSample]:
            empty = 0
            for source in drawn:
                empty += 1
                for raw in self._samples(source["url"], note):
                    empty = 0
                    yield raw
                if empty > MAX_BAD_IN_A_ROW:
                    raise BadDataError(f"{source['url']} and {empty} shards before it have no sample; expected some")

        shards = wds.ResampledShards(self.sources, deterministic=True, seed=seed, worker_seed=lambda: 0)
        shuffle = wds.shuffle(self.settings.shuffle_buffer, rng=random.Random(seed))
        yield from wds.DataPipeline(shards, expand, shuffle)

    def _samples(self, source: str, note: Callable[[Fault], None]) -> Iterator[RawSample]:
        if is_pipe(source):
            return pipe_samples(source, stall=self.settings.stall, note=note)
        path = Path(source)
        owned = self.cache is not None and self.cache.owns(path)
        url = self.cache.url(path) if self.cache and owned else source
        return file_samples(path, url, remote=self.cache if owned else None, note=note)


class _Batches(IterableDataset[Read]):
    """One worker's batches, without end; `step` is how far in the run's stream one is from the next."""

    def __init__(self, stream: ShardStream, size: int, draws: tuple[int, ...], *, step: int) -> None:
        self.stream = stream
        self.size = size
        self.draws = draws
        self.step = step

    def __iter__(self) -> Iterator[Read]:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        read = Read()

        def note(fault: Fault) -> None:
            self.stream.check(fault)
            read.faults.append((0, fault))

        raws = self.stream.raw_samples((*self.draws, first), note)
        for number in count(first, every):  # the loader takes a batch of each worker in turn
            epoch = (self.draws[1] + number * self.step) // len(self.stream)
            try:
                goods = (self._good(raws, read, epoch) for _ in range(self.size))
                read.batch = self.stream.assemble(goods, self.size)
            except Exception as error:  # told by the process that trains
                read.failure = error
            yield Read(read.batch, list(read.faults), read.failure)
            read.batch = None
            read.faults.clear()

    def _good(self, raws: Iterator[RawSample], read: Read, epoch: int) -> Item:
        """Return the next sample that can be read, as it is in an epoch."""
        for _ in range(MAX_BAD_IN_A_ROW):
            raw = next(raws)
            try:
                item = self.stream.sample.hold(raw, position=0, epoch=epoch)
                if self.stream.missing_caption == "empty" or str(item["caption"]).strip():
                    return item
                kind, reason = "missing_caption", "got no caption"
            except UnreachableError:
                raise
            except CorruptSampleError as error:
                if KINDS[error.kind].outcome == "refused":
                    raise
                kind, reason = error.kind, error.reason
            read.faults.append((0, Fault(raw.shard, raw.key, kind, reason)))
        raise BadDataError(f"{raw.shard}: got {MAX_BAD_IN_A_ROW} bad samples in a row, expected good ones among them")


def secure_webdataset() -> Any:
    """Return webdataset, told to unpickle nothing and to run no command."""
    os.environ["WDS_SECURE"] = "1"
    import webdataset

    sys.modules["webdataset.utils"].enforce_security = True  # type: ignore[attr-defined]
    return webdataset


def _as_it_is(read: Any) -> Any:
    return read
