"""Every picture of a shard once, in order, decoded once and brought to several resolutions: what encoding reads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ldm.data.captions import caption_of
from ldm.data.content import crop_values
from ldm.data.decoding import TEXT_DECODERS, row_of
from ldm.data.faults import Fault
from ldm.data.jpeg import decode_pixels
from ldm.data.kept import KeptSamples
from ldm.data.readable import open_readable
from ldm.data.remote import ShardCache
from ldm.data.shards import IMAGE_SUFFIXES, CorruptSampleError, ShardIndex, ShardReader, decode
from ldm.data.transforms import crop_box, resize

Result = TypeVar("Result")


@dataclass(frozen=True)
class Reading:
    """What is done about what cannot be read, and where remote shards are kept; as the data module's own settings."""

    bad_text: str = "skip"
    bad_shards: str = "refuse"
    missing_caption: str = "empty"
    remote: ShardCache | None = None

    def name(self, path: Path) -> str:
        """A shard's URL, or its path where it has none."""
        return self.remote.url(path) if self.remote else str(path)

    def identity(self, path: Path) -> dict[str, Any]:
        """What a shard's file is known by, without reading it; of a remote one, its URL."""
        if self.remote and self.remote.owns(path):
            return {"path": self.remote.url(path)}
        status = path.stat()
        return {"path": str(path), "bytes": status.st_size, "modified": status.st_mtime_ns}

    def open(self, path: Path, kept: str | None) -> tuple[ShardIndex | None, list[Fault]]:
        """A shard's index, of what a filter kept alone where there is one, and what is wrong with the shard.

        The index is None for a shard that is no tar and is to be skipped; raises ValueError for one to be refused.
        """
        try:
            indices, faults = open_readable([str(path)], bad_shards=self.bad_shards, remote=self.remote)
        except ValueError as error:
            if self.bad_shards == "refuse":
                raise
            return None, [Fault(self.name(path), "", "broken_tar", str(error))]
        return (KeptSamples(kept).select(indices[0]) if kept is not None else indices[0]), faults


@dataclass(frozen=True)
class Picture:
    """A sample: its key, caption, json, size in pixels before any scaling, and pixels uint8 (H, W, 3) by resolution."""

    key: str
    caption: str
    row: Mapping[str, Any]
    size: tuple[int, int]
    pixels: Mapping[int, np.ndarray]

    def encoded_row(self, resolution: int, *, shape: Sequence[int], facts: Mapping[str, Any]) -> dict[str, Any]:
        """The json of what is made of it at a resolution: its own, where it was cut out, and what encoded it.

        A picture that was scaled and cropped before, as its json says, keeps its original size, and the crops add up.
        """
        *scaled, left, top = crop_box(self.size, resolution)
        scales = [after / before for after, before in zip(scaled, self.size, strict=True)]
        width, height = self.size
        return {
            "original_width": width,
            "original_height": height,
            **self.row,
            "key": self.key,
            "caption": self.caption,
            **crop_values(self.row, (top, left), scales=scales),
            "target_width": resolution,
            "target_height": resolution,
            "shape": list(shape),
            **{name: facts[name] for name in ("encoder_sha256", "text_sha256") if name in facts},
        }


def decoded_batches(
    index: ShardIndex, resolutions: Sequence[int], *, reading: Reading, batch_size: int, readers: int = 0
) -> Iterator[list[Picture | Fault]]:
    """Yield all samples in order, `batch_size` at a time; with `readers`, threads decode one batch ahead."""
    with closing(ShardReader(remote=reading.remote)) as reader:
        reader.read(index.path, 0, 0)  # opens the file before threads share the reader
        read = partial(read_picture, index, reader, resolutions, reading)
        starts = range(0, len(index), batch_size)
        chunks = [range(start, min(start + batch_size, len(index))) for start in starts]
        if not readers:
            yield from ([read(sample) for sample in chunk] for chunk in chunks)
            return
        with ThreadPoolExecutor(readers) as pool:
            yield from _ahead(pool, read, chunks)


def read_picture(
    index: ShardIndex, reader: ShardReader, resolutions: Sequence[int], reading: Reading, sample: int
) -> Picture | Fault:
    """Decode one sample and scale and crop its picture to every resolution; or say why that cannot be."""
    key, members, shard = index.keys[sample], index.members(sample), reading.name(index.path)
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if suffix is None:
        return Fault(shard, key, "no_image", f"got {sorted(members)}, expected an image")
    decoders = {**TEXT_DECODERS[reading.bad_text], suffix: decode_pixels}
    try:
        decoded = decode(index, sample, reader, suffixes=[suffix, "txt", "json", "cls"], decoders=decoders)
    except CorruptSampleError as error:
        return Fault(shard, key, error.kind, error.reason)
    (image, size), row = decoded[suffix], row_of(decoded)
    if not image.flags.writeable:  # Pillow's own memory, which torch warns of
        image = image.copy()
    caption = caption_of(decoded.get("txt"), row)
    if reading.missing_caption == "skip" and not caption.strip():
        return Fault(shard, key, "missing_caption", "got no caption, expected one")
    return Picture(key, caption, row, size, {resolution: _cut(image, resolution) for resolution in resolutions})


def _cut(image: np.ndarray, resolution: int) -> np.ndarray:
    """Scale the short side and cut out the centre, as training does; a copy, for the decoder's memory is its own."""
    width, height, left, top = crop_box((image.shape[1], image.shape[0]), resolution)
    scaled = resize(image, (width, height))
    return np.array(scaled[top : top + resolution, left : left + resolution])


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[int], Result], chunks: Sequence[Sequence[int]]
) -> Iterator[list[Result]]:
    """Yield the results of each chunk while the next one is being read, so that two chunks are in memory."""
    pending: list[Future[Result]] = []
    for chunk in chunks:
        following = [pool.submit(read, sample) for sample in chunk]
        if pending:
            yield [future.result() for future in pending]
        pending = following
    if pending:
        yield [future.result() for future in pending]
