"""Images to measure, one at a time and by number: shards, folders, zips, .npz arrays, and splits of a data module."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.data.decoding import FORMATS, decode_image, row_of
from ldm.data.shards import IMAGE_SUFFIXES, ShardReader, decode, index_shard, resolve_shards
from ldm.data.transforms import resize_and_crop
from ldm.generation.evaluation.batches import is_text
from ldm.generation.evaluation.protocol import described, known_hashes, sha256_of_files, whole_folder
from ldm.metrics import quantize

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Prompts and labels go by these names in a batch, and so no label may.
_OF_A_ROW = ("txt", "json", "cls")
RESERVED = ("image", "index", "prompt")


class Images(Protocol):
    """A numbered set of images."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """ "image" uint8 (3, H, W), "prompt", and labels: numbers by name."""

    def name(self, index: int) -> str:
        """What an image is called in its place, such as its file."""

    def describe(self) -> dict[str, Any]:
        """Where they are, how many, the hash of their content and what is done to them."""


def open_images(path: Path | str | Sequence[str], *, resolution: int | None = None) -> Images:
    """The images of a folder, of a zip, of an .npz (ADM's `arr_0`), or of WebDataset shards, also a list of these.

    Args:
        resolution: pixels; images are scaled to it and cut at the centre as in training. None leaves them as they are.

    Raises:
        ValueError: there are none.
    """
    if not isinstance(path, str | Path):
        return ShardImages(path, resolution=resolution)
    place = Path(path).expanduser()
    if place.suffix == ".npz":
        return ArrayImages(place, resolution=resolution)
    if place.suffix == ".zip":
        return ZipImages(place, resolution=resolution)
    if place.is_dir():
        inner = place / "samples" if any((place / "samples").glob("*.tar")) else place
        if any(inner.glob("*.tar")):
            return ShardImages(inner, resolution=resolution)
        return FolderImages(place, resolution=resolution)
    if place.suffix == ".tar" or "*" in str(path) or "{" in str(path):
        return ShardImages(path, resolution=resolution)
    raise ValueError(f"got {path}, expected a folder, a .zip or .npz of images, or WebDataset shards; check the path")


class ShardImages:
    """Images of WebDataset shards, in order of shard and place, with their prompts and numeric labels."""

    def __init__(self, shards: Path | str | Sequence[str], *, resolution: int | None = None) -> None:
        self.path = list(shards) if isinstance(shards, list | tuple) else str(shards)
        self.resolution = resolution
        self.shards = [index_shard(path) for path in resolve_shards(self.path)]
        self.ends = list(accumulate(len(shard) for shard in self.shards))
        self.reader = ShardReader()
        if not len(self):
            raise ValueError(f"got {shards} without a sample, expected images")

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As in `Images`; raises ValueError, naming shard and key, for what cannot be read."""
        shard, sample = self._locate(index)
        decoded = decode(shard, sample, self.reader, suffixes=[*IMAGE_SUFFIXES, *_OF_A_ROW])
        picture = next((decoded[suffix] for suffix in IMAGE_SUFFIXES if suffix in decoded), None)
        if picture is None:
            raise ValueError(f"{shard.path}: {shard.keys[sample]} holds no image, expected one in every sample")
        return {"image": to_levels(picture, self.resolution), **_row(decoded)}

    def row(self, index: int) -> dict[str, Any]:
        """Prompt and labels alone, without decoding the image."""
        shard, sample = self._locate(index)
        return _row(decode(shard, sample, self.reader, suffixes=_OF_A_ROW))

    def name(self, index: int) -> str:
        """As in `Images`."""
        shard, sample = self._locate(index)
        return f"{shard.path.name}: {shard.keys[sample]}"

    def describe(self) -> dict[str, Any]:
        """As in `Images`."""
        digest = sha256_of_files((shard.path for shard in self.shards), known=known_hashes(s.path for s in self.shards))
        return described(self.path, len(self), digest, self.resolution)

    def _locate(self, index: int) -> tuple[Any, int]:
        number = bisect_right(self.ends, index)
        return self.shards[number], index - (self.ends[number - 1] if number else 0)


class FolderImages:
    """Picture files of a folder and of the folders in it, by name; NAME.txt beside NAME.png is a prompt."""

    def __init__(self, folder: Path | str, *, resolution: int | None = None) -> None:
        self.folder, self.resolution = Path(folder), resolution
        self.files = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self.files:
            raise ValueError(f"got {folder}, which holds no pictures ({', '.join(SUFFIXES)}) and no shards")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As in `Images`."""
        file = self.files[index]
        return {"image": to_levels(read_bytes(file.read_bytes(), str(file)), self.resolution), **self.row(index)}

    def row(self, index: int) -> dict[str, Any]:
        """The prompt alone, without decoding the image."""
        text = self.files[index].with_suffix(".txt")
        return {"prompt": text.read_text(encoding="utf-8").strip() if text.is_file() else ""}

    def name(self, index: int) -> str:
        """As in `Images`."""
        return self.files[index].relative_to(self.folder).as_posix()

    def describe(self) -> dict[str, Any]:
        """As in `Images`."""
        return described(str(self.folder), len(self), sha256_of_files(self.files), self.resolution)


class ZipImages:
    """Picture files of a zip, by name, as EDM keeps data sets."""

    def __init__(self, path: Path | str, *, resolution: int | None = None) -> None:
        self.path, self.resolution = Path(path), resolution
        check_file(self.path, "a .zip of pictures")
        self.names = sorted(name for name in self._zip.namelist() if Path(name).suffix.lower() in SUFFIXES)
        if not self.names:
            raise ValueError(f"got {path}, which holds no pictures ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As in `Images`."""
        name = self.names[index]
        try:
            content = self._zip.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"got {self.path}: {name}, which is damaged ({error}); write the zip again") from error
        picture = read_bytes(content, f"{self.path}: {name}")
        return {"image": to_levels(picture, self.resolution), **self.row(index)}

    def row(self, index: int) -> dict[str, Any]:
        """No prompt."""
        return {"prompt": ""}

    def __getstate__(self) -> dict[str, Any]:
        # An open file does not travel to a worker.
        return {key: value for key, value in vars(self).items() if key != "_zip"}

    @cached_property
    def _zip(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"got {self.path}, which is no whole zip; write it again") from error

    def name(self, index: int) -> str:
        """As in `Images`."""
        return self.names[index]

    def describe(self) -> dict[str, Any]:
        """As in `Images`."""
        return described(str(self.path), len(self), sha256_of_files([self.path]), self.resolution)


class ArrayImages:
    """The array `arr_0`, uint8 (N, H, W, 3), of an .npz as ADM's evaluator takes it, read an image at a time."""

    def __init__(self, path: Path | str, *, resolution: int | None = None) -> None:
        self.path, self.resolution = Path(path), resolution
        check_file(self.path, "an .npz with arr_0")
        self.shape = self._stream[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As in `Images`."""
        stream, shape, start = self._stream
        size = int(np.prod(shape[1:]))
        try:
            stream.seek(start + index * size)
            pixels = np.frombuffer(stream.read(size), dtype=np.uint8).reshape(shape[1:])
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            raise ValueError(f"got {self.path}, which is damaged at image {index} ({error}); write it again") from error
        return {"image": to_levels(pixels, self.resolution), **self.row(index)}

    def row(self, index: int) -> dict[str, Any]:
        """No prompt."""
        return {"prompt": ""}

    def __getstate__(self) -> dict[str, Any]:
        # An open file does not travel to a worker.
        return {key: value for key, value in vars(self).items() if key != "_stream"}

    @cached_property
    def _stream(self) -> tuple[Any, tuple[int, ...], int]:
        """(the array's bytes, its shape, where its first number lies)."""
        try:
            stream = zipfile.ZipFile(self.path).open("arr_0.npy")  # noqa: SIM115 - open as long as this object
        except (KeyError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"got {self.path} without arr_0, expected an .npz of images uint8 (N, H, W, 3); take a file of "
                "samples, not of statistics"
            ) from error
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(stream)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or is_fortran or not shape[0]:
            raise ValueError(f"got {self.path} with {dtype} {shape}, expected uint8 (N, H, W, 3)")
        return stream, shape, stream.tell()

    def name(self, index: int) -> str:
        """As in `Images`."""
        return f"image {index}"

    def describe(self) -> dict[str, Any]:
        """As in `Images`."""
        return described(str(self.path), len(self), sha256_of_files([self.path]), self.resolution)


class SplitImages:
    """A split of a data module, as training sees it but never augmented: its images, captions and columns.

    Raises:
        ValueError: the split holds moments, not images.
    """

    def __init__(self, data: Any, split: str = "validation") -> None:
        self.dataset = data.dataset(split).unaugmented()
        if self.dataset.payload != "image":
            raise ValueError(
                f"got {split} samples of moments as the real images, expected images; set reference to shards or a "
                "folder of images"
            )
        self.split, self.paths = split, [str(path) for path in data.paths[split]]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As in `Images`."""
        item = self.dataset[index, index, 0]
        labels = {name: item[name] for name in self.dataset.columns if name in item}
        return {"image": quantize(item["image"]), "prompt": item["caption"], **labels}

    def name(self, index: int) -> str:
        """As in `Images`."""
        shard, key = self.dataset.located(index)
        return f"{Path(shard).name}: {key}"

    def describe(self) -> dict[str, Any]:
        """As in `Images`."""
        manifests = sorted({Path(path).parent / "manifest.json" for path in self.paths})
        digest = hashlib.sha256(f"{self.dataset.fingerprint} {self.dataset.pictures.is_exact}".encode())
        for manifest in manifests:
            digest.update(manifest.read_bytes() if manifest.is_file() else b"")
        return described(whole_folder(self.paths), len(self), digest.hexdigest(), self.dataset.resolution)


class HeldImages:
    """The images of an object that only hands out batches, held as 8-bit levels: for sources without numbering."""

    def __init__(self, source: Any, split: str = "validation", *, batch_size: int = 256) -> None:
        self.items: list[dict[str, Any]] = []
        for batch in source.iterate_once(split, batch_size):
            if "image" not in batch:
                raise ValueError(
                    f"got {split} samples without images as the real ones, expected images; set reference to data "
                    "that has them"
                )
            columns = {name: torch.as_tensor(v) for name, v in batch.items() if not is_text(v) and name not in RESERVED}
            captions = batch.get("caption", [""] * len(batch["image"]))
            for i, levels in enumerate(quantize(batch["image"])):
                self.items.append({"image": levels, "prompt": captions[i], **{k: v[i] for k, v in columns.items()}})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As in `Images`."""
        return self.items[index]

    def name(self, index: int) -> str:
        """As in `Images`."""
        return f"image {index}"

    def describe(self) -> dict[str, Any]:
        """As in `Images`."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(item["image"].numpy().tobytes())
        return {**described("", len(self), digest.hexdigest(), None), "path": "held in memory"}


def reference_images(source: Any, *, split: str = "validation", resolution: int | None = None) -> Images:
    """The real images of a data module, of a path, or of an object with `iterate_once(split, batch_size)`."""
    if isinstance(source, str | Path):
        return open_images(source, resolution=resolution)
    if hasattr(source, "dataset") and isinstance(source.dataset(split), Dataset):
        return SplitImages(source, split)
    return HeldImages(source, split)


def to_levels(picture: Image.Image | np.ndarray, resolution: int | None) -> torch.Tensor:
    """uint8 (3, H, W) of an RGB picture, scaled and cut as in training where a resolution is given."""
    if resolution is not None:
        picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        picture = resize_and_crop(picture, resolution)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def read_bytes(content: bytes, name: str) -> Image.Image:
    """The RGB picture of a file's bytes, as shards hold it; raises ValueError, naming it, for what is none."""
    try:
        return decode_image(content, formats=(*FORMATS, "BMP"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"got {name}, which cannot be read as a picture; remove or repair it") from error


def names_of_arrays(path: Path | str) -> set[str]:
    """The names of the arrays in an .npz; raises ValueError for a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return set(getattr(file, "files", ()))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"got {path}, which is no whole .npz ({error}); write or fetch it again") from error


def check_file(path: Path, expected: str) -> None:
    """Raises FileNotFoundError where there is no such file."""
    if not path.is_file():
        raise FileNotFoundError(f"got no file at {path}, expected {expected}; check the path")


def _row(decoded: Mapping[str, Any]) -> dict[str, Any]:
    row = row_of(decoded)
    own = row.get("labels")
    given = own if isinstance(own, dict) else row
    labels = {name: value for name, value in given.items() if isinstance(value, int | float) and name not in RESERVED}
    prompt = row.get("prompt") or decoded.get("txt") or row.get("caption") or ""
    return {"prompt": str(prompt).strip() if "txt" in decoded and "prompt" not in row else str(prompt), **labels}
