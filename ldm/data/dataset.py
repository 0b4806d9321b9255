"""A map-style data set over tar shards, whose items are what one place of a batch holds."""

import hashlib
import os
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.index_file import open_index
from ldm.data.kept import KeptSamples
from ldm.data.shards import IMAGE_SUFFIXES, CorruptSampleError, ShardReader, decode, resolve_shards
from ldm.data.transforms import is_flipped, resize_and_crop, to_pixels
from ldm.data.writer import IN_PROGRESS, read_manifest

Item = dict[str, Any]


class ShardDataset(Dataset[Item]):
    """Images or moments with captions, read at random out of tar shards.

    An item is asked for by (position, index, epoch) and holds "image" float32 (3, H, W) in [-1, 1] or "moments"
    float32 (M, h, w), "caption", "index", "position" and the numeric json `columns`. The caption is the sample's
    .txt, else its json caption, else empty. Mirroring depends on (seed, epoch, index) alone.
    `cache` keeps decoded samples, before augmentation, in the memory of each process that reads. `kept` is a folder
    that `ldm data filter` wrote: the data set is then of the samples that it kept, and numbers those alone.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Sequence[str],
        *,
        resolution: int | None = None,
        columns: Sequence[str] = (),
        flip: bool = False,
        cache: bool = False,
        seed: int = 0,
        kept: str | os.PathLike[str] | None = None,
    ) -> None:
        """Raises ValueError or FileNotFoundError for shards that are missing, damaged, mixed, or lack a column."""
        self.shards = [open_index(path) for path in resolve_shards(shards)]
        self._check_manifests()
        self.is_filtered = kept is not None
        if kept is not None:
            chosen = KeptSamples(kept)
            self.shards = [chosen.select(shard) for shard in self.shards]
        self.columns = tuple(columns)
        self.resolution = resolution
        self.flip = flip
        self.seed = seed
        self.shard_sizes = [len(shard) for shard in self.shards]
        self.first_samples = np.cumsum([0, *self.shard_sizes])
        self._reader = ShardReader()
        self._cache: dict[int, Item] | None = {} if cache else None
        self.payload = self._find_payload()
        self._check_options()
        self._check_columns()
        self.encoder_sha256 = self._find_encoder() if self.payload == "moments" else None

    def __len__(self) -> int:
        return int(self.first_samples[-1])

    @property
    def fingerprint(self) -> str:
        """Say in 16 hex digits which samples these are, in which order: names, sizes and keys of all shards.

        Where a filter chose among the samples, every key counts instead of each shard's first and last.
        """
        digest = hashlib.sha256()
        for shard in self.shards:
            named = shard.digest if self.is_filtered else f"{shard.keys[:1]} {shard.keys[-1:]}"
            digest.update(f"{shard.path.name} {len(shard)} {named}\n".encode())
        return digest.hexdigest()[:16]

    def unaugmented(self) -> "ShardDataset":
        """Return the same data set without mirroring; both share their cache."""
        plain = copy(self)
        plain.flip = False
        plain._reader = ShardReader()
        return plain

    def key(self, index: int) -> str:
        """Return the shard and key of a sample, for messages."""
        shard, sample = self._locate(index)
        return f"{self.shards[shard].path}: {self.shards[shard].keys[sample]}"

    def annotation(self, index: int) -> tuple[str, Item]:
        """Return a sample's caption and its json, without decoding its picture."""
        shard, sample = self._locate(index)
        decoded = decode(self.shards[shard], sample, self._reader, suffixes=["txt", "json"])
        row = decoded.get("json", {})
        return str(decoded.get("txt", row.get("caption") or "")), row

    def __getitem__(self, place: tuple[int, int, int]) -> Item:
        position, index, epoch = place
        decoded = self._decoded(index)
        item = {**decoded, "index": index, "position": position}
        if self.payload == "image":
            image = decoded["image"]
            if self.flip and is_flipped(seed=self.seed, epoch=epoch, index=index):
                image = image[:, ::-1]
            item["image"] = to_pixels(image)
        else:
            item["moments"] = torch.from_numpy(decoded["moments"])
        return item

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
        needs_json = bool(self.columns) or "txt" not in members or self.payload == "moments"
        suffixes = [suffix for suffix in members if needs_json or suffix != "json"]
        decoded = decode(self.shards[shard], sample, self._reader, suffixes=suffixes)
        row = decoded.get("json", {})
        item: Item = {"caption": str(decoded.get("txt", row.get("caption") or ""))}
        if self.payload == "image":
            image = next(decoded[suffix] for suffix in IMAGE_SUFFIXES if suffix in decoded)
            assert self.resolution is not None  # the constructor saw to it
            item["image"] = resize_and_crop(image, self.resolution)
        else:
            item["moments"] = decoded["npy"]
            self._check_encoder(row, index)
        return item | {column: self._number(row, column, index) for column in self.columns}

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.first_samples, index, side="right")) - 1
        return shard, index - int(self.first_samples[shard])

    def _number(self, row: Item, column: str, index: int) -> float | int:
        value = row.get(column)
        if not isinstance(value, int | float):
            raise CorruptSampleError(
                f"columns: got {column}={value!r} in {self.key(index)}, expected a number; its json has {sorted(row)}"
            )
        return value

    def _check_manifests(self) -> None:
        """Refuse shards that are still being written, or differ in size from what the manifest beside them says."""
        folders = {shard.path.parent for shard in self.shards}
        stated: dict[Path, int] = {}
        for folder in folders:
            if (folder / IN_PROGRESS).exists():
                raise ValueError(f"{folder}: got an unfinished set of shards, expected a whole one; write it again")
            entries = (read_manifest(folder) or {}).get("shards", [])
            stated |= {folder / entry["name"]: entry["num_samples"] for entry in entries}
        for shard in self.shards:
            if stated.get(shard.path, len(shard)) != len(shard):
                raise ValueError(
                    f"{shard.path}: got {len(shard)} samples, expected {stated[shard.path]} as its manifest says; "
                    "write the shards again"
                )

    def _find_payload(self) -> str:
        """Return "image" or "moments": what every sample has."""
        if not len(self):
            left = "of which data.filter keeps no sample" if self.is_filtered else "without a sample"
            raise ValueError(f"shards: got {len(self.shards)} shards {left}, expected at least one sample")
        images = np.concatenate([shard.has_any(IMAGE_SUFFIXES) for shard in self.shards])
        moments = np.concatenate([shard.has_any(["npy"]) for shard in self.shards])
        wrong = (images == moments) | (images != images[0])
        if wrong.any():
            raise ValueError(
                f"{self.key(int(np.argmax(wrong)))}: got a sample that differs from the rest, expected one image "
                f"({', '.join(IMAGE_SUFFIXES)}) in every sample or moments (npy) in every one; write the shards again"
            )
        return "image" if images[0] else "moments"

    def _check_options(self) -> None:
        if self.payload == "image" and (self.resolution is None or self.resolution < 1):
            raise ValueError(f"data.resolution: got {self.resolution} for shards of images, expected pixels, as in 256")
        if self.payload == "moments" and self.resolution is not None:
            raise ValueError(
                f"data.resolution: got {self.resolution} for shards of moments, whose size is given; expected null"
            )
        if self.payload == "moments" and self.flip:
            raise ValueError("data.flip: got true for shards of moments, expected false; flip images before encoding")

    def _check_columns(self) -> None:
        if not self.columns:
            return
        shard, sample = self._locate(0)
        row = decode(self.shards[shard], sample, self._reader, suffixes=["json"]).get("json", {})
        missing = [column for column in self.columns if column not in row]
        if missing:
            raise ValueError(f"data.columns: got {missing}, expected some of {sorted(row)} as in {self.key(0)}.json")

    def _find_encoder(self) -> str:
        """Return the one encoder whose moments these are, by the first sample of every shard."""
        found: dict[str, Path] = {}
        for shard in self.shards:
            if len(shard):
                row = decode(shard, 0, self._reader, suffixes=["json"]).get("json", {})
                found.setdefault(str(row.get("encoder_sha256", "")), shard.path)
        if len(found) != 1 or "" in found:
            listed = ", ".join(f"{sha256[:12] or 'none'} in {path}" for sha256, path in found.items())
            raise ValueError(f"encoder_sha256: got {listed}, expected one encoder; encode all shards with the same")
        return next(iter(found))

    def _check_encoder(self, row: Item, index: int) -> None:
        if row.get("encoder_sha256") != self.encoder_sha256:
            raise CorruptSampleError(
                f"{self.key(index)}: got moments of encoder {str(row.get('encoder_sha256'))[:12]}, "
                f"expected {str(self.encoder_sha256)[:12]} as in the others; encode all shards with the same"
            )


def collate(items: Sequence[Item]) -> Item:
    """Stack items into a batch: tensors on a new first axis, numbers into tensors (B,), captions into a list."""
    return {name: _stack([item[name] for item in items]) for name in items[0]}


def _stack(values: list[Any]) -> Tensor | list[str]:
    if isinstance(values[0], Tensor):
        return torch.stack(values)
    if isinstance(values[0], str):
        return values
    return torch.tensor(values)
