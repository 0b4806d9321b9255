"""A map-style data set over tar shards, whose items are what one place of a batch holds."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data.augmentation import Augmentation
from ldm.data.batches import PICTURES, assemble
from ldm.data.buckets import Buckets
from ldm.data.captions import TEXT as CAPTION_FILE
from ldm.data.captions import CaptionChoice, caption_of
from ldm.data.content import SIZE_COLUMNS, Derived, Pictures, size_values
from ldm.data.decoding import TEXT_DECODERS, row_of
from ldm.data.embeddings import FLIPPED, HASH, TEXT, batch_arrays
from ldm.data.faults import Fault
from ldm.data.indices import ShardIndices
from ldm.data.kept import KeptSamples
from ldm.data.readable import Manifests, drop_without_payload, each_readable
from ldm.data.readers import ThreadReaders
from ldm.data.remote import ShardCache
from ldm.data.rows import ColumnNames, MissingColumnError
from ldm.data.shards import IMAGE_SUFFIXES, CorruptSampleError, ShardReader, decode
from ldm.data.sizes import picture_sizes
from ldm.data.transforms import is_flipped, to_pixels

Item = dict[str, Any]


class ShardDataset(Dataset[Item]):
    """Images or moments with captions, read at random out of tar shards.

    An item is asked for by (position, index, epoch) and holds "image" float32 (3, H, W) in [-1, 1] or "moments"
    float32 (M, h, w), "caption", "index", "position" and the numeric `columns` of the json, or of the .cls member; of
    pictures, those of SIZE_COLUMNS say how they were cut. The caption is the sample's .txt, else its json caption, else
    empty; with `captions`, weights by column of the json or `txt`, one of several. Whatever is drawn depends on (seed,
    epoch, index) alone. `shards` by name are several sets, each numbered behind the one before.
    `cache` keeps decoded samples, before augmentation, in the memory of each process that reads. `kept` is a folder
    that `ldm data filter` wrote: the data set is then of the samples that it kept, and numbers those alone.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Sequence[str] | Mapping[str, str | Sequence[str]],
        *,
        resolution: int | None = None,
        columns: Sequence[str] = (),
        flip: bool = False,
        cache: bool = False,
        seed: int = 0,
        kept: str | os.PathLike[str] | None = None,
        bad_text: str = "skip",
        bad_shards: str = "refuse",
        remote: ShardCache | None = None,
        augmentation: Augmentation | None = None,
        derive: Derived | None = None,
        buckets: Buckets | None = None,
        captions: Mapping[str, float] | None = None,
        exact_decoding: bool = True,
    ) -> None:
        """Raises ValueError or FileNotFoundError for shards that are missing, damaged, mixed, or lack a column."""
        self.bad_text = bad_text
        self.remote = remote
        self.is_filtered = kept is not None
        self.shards = ShardIndices()
        self.index_faults: list[Fault] = []
        self.group_sizes: list[int] = []
        for group in shards.values() if isinstance(shards, Mapping) else [shards]:
            self._open(group, kept=kept, bad_shards=bad_shards)
        self.columns = tuple(columns)
        self.resolution = resolution
        self.seed = seed
        self.pictures = Pictures(augmentation or Augmentation(), flip, derive, exact_decoding, seed)
        self.captions = CaptionChoice(captions, seed=seed) if captions else None
        self.shard_sizes = [summary.num_samples for summary in self.shards.summaries]
        self.first_samples = np.cumsum([0, *self.shard_sizes])
        self._readers, self._names = ThreadReaders(self.remote), ColumnNames()
        self._cache: dict[int, Item] | None = {} if cache else None
        self.payload = self._find_payload()
        self.buckets = buckets
        self._check_options()
        self._check_columns()
        self._check_named()
        self.encoder_sha256 = self._find_encoder() if self.payload == "moments" else None
        self.text_sha256 = self._find_encoder(HASH) if self.payload == "moments" else None
        self.bucket_of = None if buckets is None else buckets.assign(picture_sizes(self.shards, self._reader))

    def __len__(self) -> int:
        return int(self.first_samples[-1])

    @cached_property
    def fingerprint(self) -> str:
        """Say in 16 hex digits which samples these are, in which order: names, sizes and keys of all shards.

        Of a shard of which some were chosen every key counts, of others the first and the last.
        """
        digest = hashlib.sha256()
        for path, summary in zip(self.shards.paths, self.shards.summaries, strict=True):
            digest.update(f"{path.name} {summary.mark} {summary.digest}\n".encode())
        return digest.hexdigest()[:16]

    def unaugmented(self) -> "ShardDataset":
        """Return the same data set with pictures of one size and nothing random; the two share a cache if they can."""
        plain = copy(self)
        plain.pictures = self.pictures.unaugmented()
        plain.buckets = plain.bucket_of = None
        reads_mirrored = self.payload == "moments" and self.pictures.flip
        if not self.pictures.is_plain or self.buckets is not None or reads_mirrored:
            plain._cache = None if self._cache is None else {}
        return plain

    def target(self, index: int) -> tuple[int, int]:
        """Return the (width, height) that a sample's picture is scaled and cut to."""
        if self.buckets is not None and self.bucket_of is not None:
            return self.buckets.sizes[self.bucket_of[index]]
        assert self.resolution is not None  # the constructor saw to it
        return self.resolution, self.resolution

    def key(self, index: int) -> str:
        """Return the shard and key of a sample, for messages."""
        shard, sample = self._locate(index)
        return f"{self.shards[shard].path}: {self.shards[shard].keys[sample]}"

    def located(self, index: int) -> tuple[str, str]:
        """Return the shard, by its URL where it has one, and the key of a sample."""
        shard, sample = self._locate(index)
        path = self.shards.paths[shard]
        return self.remote.url(path) if self.remote else str(path), self.shards[shard].keys[sample]

    def substitutes(self, index: int) -> Iterator[int]:
        """Yield the samples that may stand in for one that cannot be read: those that follow in its set, from its start
        on after the end.
        """
        ends = self.first_samples[np.cumsum(self.group_sizes)]
        group = int(np.searchsorted(ends, index, side="right"))
        first, end = int(ends[group - 1]) if group else 0, int(ends[group])
        for other in chain(range(index + 1, end), range(first, index)):
            if self.bucket_of is None or self.bucket_of[other] == self.bucket_of[index]:
                yield other

    def annotation(self, index: int) -> tuple[str, Item]:
        """Return a sample's caption and columns as a pass reads them, without decoding its picture."""
        shard, sample = self._locate(index)
        decoders = TEXT_DECODERS[self.bad_text]
        decoded = decode(self.shards[shard], sample, self._reader, suffixes=["txt", "json", "cls"], decoders=decoders)
        row = row_of(decoded)
        caption = self._captions(decoded.get("txt"), row)
        if self.captions is not None:
            caption = self.captions.choose(caption, index=index, epoch=0)
        spelt = {column: self._spelt(column, row) for column in self.columns}
        return caption, {column: row[name] for column, name in spelt.items() if name is not None}

    def __getitem__(self, place: tuple[int, int, int]) -> Item:
        item = self.read(place)
        for name, value in item.items():
            if name in PICTURES:
                item[name] = to_pixels(value)
            elif isinstance(value, np.ndarray):
                item[name] = torch.from_numpy(value.astype(np.float32 if name == "mask" else value.dtype))
        return item

    def read(self, place: tuple[int, int, int]) -> Item:
        """Return a sample as `assemble` puts it into a batch: pictures uint8 (H, W, 3), other arrays of numpy."""
        position, index, epoch = place
        decoded = self._decoded(index)
        item = {**decoded["item"], "index": index, "position": position}
        if self.captions is not None:
            item["caption"] = self.captions.choose(item["caption"], index=index, epoch=epoch)
        if self.payload == "image":
            return item | self._picture(decoded, index, epoch)
        if self.pictures.flip and is_flipped(seed=self.seed, epoch=epoch, index=index):
            item["moments"] = decoded["flipped"]
        return item

    def _picture(self, decoded: Item, index: int, epoch: int) -> Item:
        """Return what a sample holds of its picture in an epoch."""
        try:
            arrays, geometry = self.pictures.sample(
                decoded["picture"], self.target(index), index=index, epoch=epoch, row=decoded["row"]
            )
        except (ValueError, TypeError) as error:  # of what is derived from the json
            reason = f"got a json of which nothing can be derived ({error})"
            raise CorruptSampleError(f"{self.key(index)}: {reason}", kind="broken_json", reason=reason) from error
        return arrays | size_values(self.columns, decoded["row"], geometry)

    def _decoded(self, index: int) -> Item:
        """Return what does not depend on the epoch: uint8 pixels (H, W, 3) or moments, caption and columns."""
        if self._cache is None:
            return self._decode(index)
        if index not in self._cache:
            self._cache[index] = self._decode(index)
        return self._cache[index]

    def _decode(self, index: int) -> Item:
        shard, sample = self._locate(index)
        members = self.shards[shard].members(sample)
        unwanted = {FLIPPED} if self.payload == "image" or not self.pictures.flip else set()
        unwanted |= set() if self._needs_json("txt" in members) else {"json"}
        suffixes = [suffix for suffix in members if suffix not in unwanted]
        decoders = dict(TEXT_DECODERS[self.bad_text])
        if self.payload == "image":
            load = self.pictures.loader(self.target(index), keep=self._cache is not None)
            decoders |= dict.fromkeys(IMAGE_SUFFIXES, load)
        decoded = decode(self.shards[shard], sample, self._reader, suffixes=suffixes, decoders=decoders)
        row = row_of(decoded)
        item: Item = {"caption": self._captions(decoded.get("txt"), row)}
        item |= {column: self._number(row, column, index) for column in self.json_columns}
        if self.payload == "image":
            picture = next(decoded[suffix] for suffix in IMAGE_SUFFIXES if suffix in decoded)
            return {"item": item, "row": row, "picture": picture}
        self._check_encoder(row, index)
        item |= {"moments": decoded["npy"], **batch_arrays(decoded.get(TEXT, {}))}
        return {"item": item, "flipped": decoded.get(FLIPPED)}

    def _captions(self, text: str | None, row: Item) -> Any:
        """Return a sample's caption, or the candidates of which one is chosen."""
        if self.captions is not None:
            return self.captions.candidates(text, row)
        return caption_of(text, row)

    @property
    def json_columns(self) -> tuple[str, ...]:
        """Those of the columns that samples state, and that are not known from how their pictures are cut."""
        return tuple(c for c in self.columns if self.payload != "image" or c not in SIZE_COLUMNS)

    def _needs_json(self, has_text: bool) -> bool:
        """Say whether a sample's json has to be read."""
        needed = self.columns or self.captions or self.pictures.derive or self.payload == "moments"
        return bool(needed) or not has_text

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.first_samples, index, side="right")) - 1
        return shard, index - int(self.first_samples[shard])

    def _spelt(self, column: str, row: Item) -> str | None:
        """Return how a json spells a column, as `ldm data filter` finds it; None where it lacks it."""
        with suppress(MissingColumnError):
            return column if column in row else self._names.find(column, tuple(row))
        return None

    def _number(self, row: Item, column: str, index: int) -> float | int:
        value = row.get(self._spelt(column, row) or column)
        if not isinstance(value, int | float):
            raise CorruptSampleError(
                f"columns: got {column}={value!r} in {self.key(index)}, expected a number; its json has {sorted(row)}",
                kind="missing_column",
                reason=f"got {column}={value!r}, expected a number",
            )
        return value

    @property
    def _reader(self) -> ShardReader:
        """This thread's reader."""
        return self._readers.reader

    def _open(
        self,
        shards: str | os.PathLike[str] | Sequence[str],
        *,
        kept: str | os.PathLike[str] | None,
        bad_shards: str,
    ) -> None:
        """Index the shards of one set, behind those that there are."""
        chosen, manifests, before = KeptSamples(kept) if kept is not None else None, Manifests(), len(self.shards)
        for index, faults in each_readable(shards, bad_shards=bad_shards, remote=self.remote):
            self.index_faults += faults
            if index is None:
                continue
            if not faults:  # else it was cut off
                manifests.check(index)
            index, without_payload = drop_without_payload(chosen.select(index) if chosen is not None else index)
            self.index_faults += without_payload
            self.shards.append(index)
        self.group_sizes.append(len(self.shards) - before)

    def _find_payload(self) -> str:
        """Return "image" or "moments": what every sample has."""
        if not len(self):
            left = "of which data.filter keeps no sample" if self.is_filtered else "without a sample"
            raise ValueError(f"shards: got {len(self.shards)} shards {left}, expected at least one sample")
        shard, sample = self._locate(0)
        is_image = bool(self.shards[shard].has_any(IMAGE_SUFFIXES)[sample])
        for number, told in enumerate(self.shards.summaries):
            counts = (told.num_samples, 0) if is_image else (0, told.num_samples)
            if (told.num_images, told.num_moments) != counts:
                images, moments = self.shards[number].has_any(IMAGE_SUFFIXES), self.shards[number].has_any(["npy"])
                wrong = int(self.first_samples[number]) + int(np.argmax((images & moments) | (images != is_image)))
                raise ValueError(
                    f"{self.key(wrong)}: got a sample that differs from the rest, expected one image "
                    f"({', '.join(IMAGE_SUFFIXES)}) in every sample or moments (npy) in every one; write the shards "
                    "again"
                )
        return "image" if is_image else "moments"

    def _check_options(self) -> None:
        if self.payload == "image" and (self.resolution is None or self.resolution < 1):
            raise ValueError(f"data.resolution: got {self.resolution} for shards of images, expected pixels, as in 256")
        if self.payload == "moments" and self.resolution is not None:
            raise ValueError(
                f"data.resolution: got {self.resolution} for shards of moments, whose size is given; expected null"
            )
        if self.payload == "moments":
            self._check_nothing_of_pictures()
        if self.payload == "moments" and self.pictures.flip:
            told = zip(self.shards.paths, self.shards.summaries, strict=True)
            lacking = next((path for path, summary in told if summary.num_flipped < summary.num_samples), None)
            if lacking is not None:
                raise ValueError(
                    f"data.flip: got true for shards of moments, of which {lacking} has none of "
                    "mirrored pictures, expected false; or encode with ldm data encode flips=true"
                )

    def _check_nothing_of_pictures(self) -> None:
        """Refuse what is done to pictures alone: of latents it would have no effect."""
        given = {
            "augmentation": None if self.pictures.augmentation == Augmentation() else self.pictures.augmentation,
            "derive": self.pictures.derive and type(self.pictures.derive).__name__,
            "buckets": self.buckets and self.buckets.sizes,
        }
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"data.{name}: got {value} for shards of moments, which are cut and coloured already, expected "
                    f"null; leave {name} out, or train on the pictures; latents are mirrored by data.flip"
                )

    def _check_named(self) -> None:
        """Refuse columns of captions, or to derive from, that none of the first samples has: all would be without."""
        wanted: dict[str, Sequence[str]] = {}
        if self.captions is not None:
            wanted["data.captions"] = list(self.captions.weights)
        if self.pictures.derive is not None and self.payload == "image":
            wanted["data.derive"] = self.pictures.derive.columns
        if not any(wanted.values()):
            return
        known = set().union(*islice((row for shard in range(len(self.shards)) for row in self._rows(shard)), 100))
        for setting, names in wanted.items():
            if strange := sorted(set(names) - known - {CAPTION_FILE}):
                listed = ", ".join(sorted(known | {CAPTION_FILE}))
                raise ValueError(f"{setting}: got {', '.join(strange)}, expected some of {listed}")

    def _check_columns(self) -> None:
        if not self.json_columns:
            return
        row = next((row for shard in range(len(self.shards)) for row in self._rows(shard)), {})
        spelt = {column: self._spelt(column, row) for column in self.json_columns}
        missing = [column for column, name in spelt.items() if name is None]
        if missing:
            raise ValueError(f"data.columns: got {missing}, expected some of {sorted(row)} as in {self.key(0)}.json")
        texts = [column for column, name in spelt.items() if name and isinstance(row[name], str | list | dict)]
        if texts:
            raise ValueError(f"data.columns: got {texts}, which hold no numbers in {self.key(0)}.json; leave them out")

    def _find_encoder(self, name: str = "encoder_sha256") -> str | None:
        """Return the one encoder whose moments these are, by the first sample of every shard; None without text."""
        found: dict[str, Path] = {}
        # Of remote shards the first alone, which need not all be fetched for it; every sample is looked at when read.
        for number, path in enumerate(self.shards.paths[: 1 if self.remote else None]):
            for row in islice(self._rows(number), 1):
                found.setdefault(str(row.get(name, "")), path)
        if name == HASH and found.keys() == {""}:
            return None
        if len(found) != 1 or "" in found:
            listed = ", ".join(f"{sha256[:12] or 'none'} in {path}" for sha256, path in found.items())
            raise ValueError(f"{name}: got {listed}, expected one encoder; encode all shards with the same")
        return next(iter(found))

    def _rows(self, shard: int) -> Iterator[Item]:
        """Yield the json of a shard's samples, empty where there is none, without those that cannot be read."""
        for sample in range(len(self.shards[shard])):
            with suppress(CorruptSampleError):
                yield row_of(decode(self.shards[shard], sample, self._reader, suffixes=["json", "cls"]))

    def _check_encoder(self, row: Item, index: int) -> None:
        for name, what in (("encoder_sha256", "moments"), (HASH, "text embeddings")):
            expected = getattr(self, name)
            if row.get(name) != expected:
                raise CorruptSampleError(
                    f"{self.key(index)}: got {what} of encoder {str(row.get(name))[:12]}, "
                    f"expected {str(expected)[:12]} as in the others; encode all shards with the same",
                    kind="foreign_moments",
                )


def collate(items: Sequence[Item]) -> Item:
    """Put items into a batch: tensors and arrays stacked, numbers into tensors (B,), captions into a list."""
    plain = [{k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in item.items()} for item in items]
    return assemble(plain, len(plain))
