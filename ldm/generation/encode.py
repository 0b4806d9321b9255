"""Pictures to latents and captions to text embeddings, once: shards that training reads instead of encoding anew.

Each input shard is a task of `ldm.generation.executors`: its pictures are decoded once, brought to every resolution
that is asked for, encoded by every autoencoder, and written as one output shard for each. What a task writes depends
on its shard and the settings alone, so the bytes are the same whoever runs it and however often it was killed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ldm.autoencoders import Autoencoder
from ldm.conditioners import Conditioner
from ldm.conditioners.precomputed import embedded, null_bytes, text_sha256, token_ids, tokens_sha256
from ldm.data.encode_input import Picture, Reading, decoded_batches
from ldm.data.encoded import EncodedSample, EncodedShard, read_note, write_manifest
from ldm.data.faults import Fault
from ldm.data.kept import KeptSamples
from ldm.files import write_bytes
from ldm.generation.executors import Local
from ldm.nn.fingerprint import weights_sha256 as weights_sha256

# The null condition and the hash of the text encoder, beside the shards; and the samples that could not be read.
NULL_TEXT, LEFT_OUT = "text.safetensors", "left_out.jsonl"
DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Splits(Protocol):
    """What names the pictures: the data module, or anything with its members."""

    paths: dict[str, list[Path]]
    resolution: int | None
    filter: Any
    bad_text: str
    bad_shards: str
    missing_caption: str
    captions: Any
    remote: Any


@dataclass(frozen=True)
class Settings:
    """How to encode; all but `readers` decide the bytes.

    Args:
        batch_size: pictures encoded at once, of one shard.
        text: what a text encoder's captions are stored as: its embeddings, or the token ids that it reads.
        dtype, text_dtype: of moments and of text embeddings on the disk; encoding itself is in float32.
        threads: of torch on the CPU, on whose number the last bits of a sum may depend.
        readers: threads that decode ahead of the encoder; 0 = none.
    """

    batch_size: int = 256
    text: str = "embeddings"
    dtype: str = "float32"
    text_dtype: str = "float16"
    threads: int = 1
    readers: int = 2

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.readers < 0:
            raise ValueError(f"readers: got {self.readers}, expected threads, 0 or more")
        if self.text not in ("embeddings", "ids"):
            raise ValueError(f"text: got {self.text}, expected embeddings or ids")
        for name in ("dtype", "text_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Target:
    """One set of latents: by which autoencoder, of pictures of how many pixels, mirrored ones too or not."""

    autoencoder: Autoencoder
    resolution: int
    flips: bool = False

    def __post_init__(self) -> None:
        unit = self.autoencoder.downsampling_factor
        if self.resolution < 1 or self.resolution % unit:
            raise ValueError(
                f"resolution: got {self.resolution}, expected a multiple of {unit}, by which the autoencoder divides"
            )


@dataclass(frozen=True)
class Encoders:
    """What a process loads: a target for each folder ("" is the run's own), and perhaps a text encoder."""

    targets: Mapping[str, Target]
    text: Conditioner | None = None


@dataclass(frozen=True)
class Source:
    """One input shard: its split, its number in it, and the folder of a filter whose choice, by its hash, counts."""

    split: str
    number: int
    path: Path
    kept: str | None = None
    choice: str | None = None

    @property
    def name(self) -> str:
        """The name of what is made of it."""
        return f"{self.number:05d}.tar"


@dataclass
class EncodeWork:
    """The tasks of encoding a data set, one for each input shard; see `ldm.generation.executors.Work`.

    Args:
        folder: <folder>/<split>/, and <folder>/<target>/<split>/ of named targets, get the shards.
        load: loads the encoders in a process that has none yet; can be pickled.
        facts: by target, what its shards say of themselves; of `make_facts`.
    """

    folder: Path
    sources: Sequence[Source]
    load: Callable[[], Encoders]
    settings: Settings
    facts: Mapping[str, Mapping[str, Any]]
    reading: Reading = field(default_factory=Reading)
    _encoders: list[Encoders] = field(default_factory=list, repr=False)

    @property
    def num_tasks(self) -> int:
        return len(self.sources)

    def is_done(self, task: int) -> bool:
        return all(self.note(target, self.sources[task]) is not None for target in self.facts)

    def do(self, task: int) -> None:
        source, encoders = self.sources[task], self.encoders()
        targets = [name for name in self.facts if self.note(name, source) is None]
        with one_way(self.settings.threads):
            encode_shard(self, source, Encoders({name: encoders.targets[name] for name in targets}, encoders.text))

    def encoders(self) -> Encoders:
        """The encoders, loaded on first use.

        Raises:
            ValueError: they are others than those that the work was made for.
        """
        if not self._encoders:
            loaded = self.load()
            if make_facts(loaded, self.settings) != self.facts:
                raise ValueError("autoencoder: got another one than at the start of this run, expected the same file")
            self._encoders.append(loaded)
        return self._encoders[0]

    def note(self, target: str, source: Source) -> dict[str, Any] | None:
        """What the finished task left of a target, or None."""
        return read_note(self.place(target, source.split), source.name, facts=self.stated(target, source))

    def place(self, target: str, split: str) -> Path:
        """The folder of a target's shards."""
        return self.folder / target / split

    def stated(self, target: str, source: Source) -> dict[str, Any]:
        """What a task's note must say: the target's facts, the settings that decide bytes, and the very input."""
        settings = {name: value for name, value in asdict(self.settings).items() if name != "readers"}
        kept = None if source.kept is None else {"folder": source.kept, "sha256": source.choice}
        given = {**self.reading.identity(source.path), "kept": kept}
        return {**self.facts[target], "settings": settings, "source": given}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoders": []}


def prepare(
    load: Callable[[], Encoders], data: Splits, folder: Path, *, settings: Settings, keep: bool = True
) -> EncodeWork:
    """The work of encoding every split of the data; loads the encoders to know their hashes, and may keep them.

    Writes the null condition of a text encoder beside the shards, where training with dropped conditions finds it.

    Raises:
        ValueError: a target has the name of a split, or captions that training would choose are to be encoded once.
    """
    encoders = load()
    facts = make_facts(encoders, settings)
    if clash := set(encoders.targets) & set(data.paths):
        raise ValueError(f"targets: got {sorted(clash)}, the name of a split, expected another name")
    if encoders.text is not None and data.captions:
        raise ValueError(
            f"data.captions: got {dict(data.captions)} with a text encoder, which encodes a sample's .txt or its "
            "json's caption alone, expected null; leave data.captions out, or encode pictures alone: conditioner=null"
        )
    kept = (str(data.filter), KeptSamples(data.filter).sha256) if data.filter else (None, None)
    sources = [
        Source(split, number, Path(path), *(kept if split == "train" else ()))
        for split, paths in data.paths.items()
        for number, path in enumerate(paths)
    ]
    if encoders.text is not None and settings.text == "embeddings":
        content = null_bytes(encoders.text, dtype=DTYPES[settings.text_dtype])
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / NULL_TEXT, content)
    reading = Reading(data.bad_text, data.bad_shards, data.missing_caption, data.remote)
    work = EncodeWork(folder, sources, load, settings, facts, reading)
    if keep:
        work._encoders.append(encoders)
    return work


def encode_dataset(
    autoencoder: Autoencoder,
    data: Splits,
    folder: Path,
    *,
    text: Conditioner | None = None,
    flips: bool = False,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Encodes every split of the data in this process; returns what `finish` does.

    Raises:
        ValueError: the data say no resolution.
    """
    if data.resolution is None:
        raise ValueError("data.resolution: got null, expected the pixels to encode at, as in data.resolution=256")
    encoders = Encoders({"": Target(autoencoder.eval(), data.resolution, flips)}, text)
    work = prepare(lambda: encoders, data, folder, settings=settings or Settings())
    Local().run(work)
    return finish(work)


def make_facts(encoders: Encoders, settings: Settings) -> dict[str, dict[str, Any]]:
    """By target, what its shards and manifest say: hashes of the encoders, resolution, flips, dtype."""
    text: dict[str, Any] = {}
    if encoders.text is not None and settings.text == "ids":
        text = {"text_sha256": tokens_sha256(encoders.text)}
    elif encoders.text is not None:
        text = {"text_sha256": text_sha256(encoders.text), "text_dtype": settings.text_dtype}
    return {
        name: {
            "encoder_sha256": weights_sha256(target.autoencoder),
            "resolution": target.resolution,
            "flips": target.flips,
            "dtype": settings.dtype,
            **text,
        }
        for name, target in encoders.targets.items()
    }


def finish(work: EncodeWork) -> dict[str, Any]:
    """Writes the manifests and left_out.jsonl out of what the tasks left; returns the numbers of samples.

    Called once, after every task is done.
    """
    summary: dict[str, Any] = {"encoder_sha256": next(iter(work.facts.values()))["encoder_sha256"]}
    bad: dict[tuple[str, str], dict[str, str]] = {}
    for target, facts in work.facts.items():
        counts = {}
        for split in dict.fromkeys(source.split for source in work.sources):
            notes = [_found(work, target, source) for source in work.sources if source.split == split]
            counts[split] = write_manifest(work.place(target, split), notes, facts=facts)["num_samples"]
            bad |= {(row["shard"], row["key"]): row for note in notes for row in note["bad"]}
        if target:
            summary["targets"] = {**summary.get("targets", {}), target: {**counts, **facts}}
        else:
            summary |= {**counts, **{name: facts[name] for name in ("text_sha256",) if name in facts}}
    lines = "".join(json.dumps(row) + "\n" for row in bad.values())
    write_bytes(work.folder / LEFT_OUT, lines.encode())
    return {**summary, "bad": len(bad)}


def encode_shard(work: EncodeWork, source: Source, encoders: Encoders) -> None:
    """Encodes one input shard for every target; samples that cannot be read are left out, and noted."""
    index, bad = work.reading.open(source.path, source.kept)
    resolutions = sorted({target.resolution for target in encoders.targets.values()})
    with ExitStack() as stack:
        shards = {
            name: stack.enter_context(
                EncodedShard(work.place(name, source.split), source.name, work.stated(name, source))
            )
            for name in encoders.targets
        }
        sizes = {"batch_size": work.settings.batch_size, "readers": work.settings.readers}
        batches = decoded_batches(index, resolutions, reading=work.reading, **sizes) if index is not None else ()
        for items in batches:
            bad += [item for item in items if isinstance(item, Fault)]
            if pictures := [item for item in items if isinstance(item, Picture)]:
                _encode_batch(work, encoders, pictures, shards)
        for shard in shards.values():
            shard.finish(bad=[asdict(fault) for fault in bad])


@torch.no_grad()
def _encode_batch(
    work: EncodeWork, encoders: Encoders, pictures: Sequence[Picture], shards: Mapping[str, EncodedShard]
) -> None:
    texts = _texts(encoders.text, pictures, work.settings)
    for name, target in encoders.targets.items():
        pixels = torch.from_numpy(np.stack([picture.pixels[target.resolution] for picture in pictures]))
        images = pixels.to(target.autoencoder.latent_scale.device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        moments = _moments(target.autoencoder, images, DTYPES[work.settings.dtype])
        flipped = _moments(target.autoencoder, images.flip(-1), DTYPES[work.settings.dtype]) if target.flips else None
        for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
            row = picture.encoded_row(target.resolution, shape=moments[i].shape, facts=work.facts[name])
            flip = None if flipped is None else flipped[i]
            shards[name].add(EncodedSample(picture.key, picture.caption, row, moments[i], flip, text))


def _moments(autoencoder: Autoencoder, images: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """Moments (B, M, h, w) on the CPU; raises ValueError where they do not fit the dtype."""
    return _fitted(autoencoder.encode(images).float(), dtype, option="dtype")


def _texts(
    encoder: Conditioner | None, pictures: Sequence[Picture], settings: Settings
) -> Sequence[dict[str, np.ndarray] | None]:
    """Each picture's text embeddings or token ids, or None without an encoder."""
    if encoder is None:
        return [None] * len(pictures)
    captions = [picture.caption for picture in pictures]
    parts = token_ids(encoder, captions) if settings.text == "ids" else embedded(encoder, captions)
    arrays = {
        name: _fitted(part, DTYPES[settings.text_dtype], option="text_dtype")
        if part.is_floating_point()
        else part.numpy()
        for name, part in parts.items()
    }
    return [{name: array[i] for name, array in arrays.items()} for i in range(len(pictures))]


def _fitted(values: torch.Tensor, dtype: torch.dtype, *, option: str) -> np.ndarray:
    cast = values.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        largest = values.abs().max().item()
        raise ValueError(f"{option}: got values up to {largest:g}, which {dtype} cannot hold; set {option}=float32")
    return cast.cpu().numpy()


@contextmanager
def one_way(threads: int) -> Iterator[None]:
    """Lets torch compute the same numbers every time: so many threads, and no kernel chosen by a race."""
    before = torch.get_num_threads(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[1:]


def _found(work: EncodeWork, target: str, source: Source) -> dict[str, Any]:
    note = work.note(target, source)
    assert note is not None, "finish comes after every task"
    return note
