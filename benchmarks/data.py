"""Batches a second, ours beside the pipeline that open_clip trains with: webdataset, Pillow and torchvision.

    python benchmarks/data.py                    # all of it, some minutes on two cores
    python benchmarks/data.py --only pixels-512 --images 96 --repeats 3

Both read the same shards, which are made first: photographs that scikit-learn and scikit-image ship, enlarged to one
megapixel with grain, as JPEGs of two bits a pixel; and moments (8, 32, 32) float32 with a caption, a json and 77 token
ids. The two take turns, repeat after repeat, and the medians of the repeats and of their ratios are printed.
`core` divides by the seconds of the processor, so that other work on the machine
counts little; `both` divides by the clock's, with two workers.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.data import ShardDataModule, ShardDataset
from ldm.data.orders import training_order
from ldm.data.position import RankBatches

SIZE = (1152, 896)
BATCH = 16
LATENT_BATCH = 128
MOMENTS = (8, 32, 32)
CAPTION = "a photograph of a place with some grain, number {}"


def photographs() -> list[Image.Image]:
    from skimage import data
    from sklearn.datasets import load_sample_images

    arrays = [*load_sample_images().images, data.astronaut(), data.coffee(), data.chelsea()]
    return [Image.fromarray(array) for array in arrays]


def write_pixels(folder: Path, count: int, *, per_shard: int = 32) -> None:
    """JPEGs of one megapixel, each another part of a photograph, at 2 bits a pixel or so."""
    sources, random = photographs(), np.random.default_rng(0)
    samples = []
    for i in range(count):
        source = sources[i % len(sources)]
        scale, (left, top) = random.uniform(0.6, 0.95), random.uniform(0, 0.3, 2)
        box = (
            left * source.width,
            top * source.height,
            min(1, left + scale) * source.width,
            min(1, top + scale) * source.height,
        )
        image = np.asarray(source.resize(SIZE, Image.Resampling.BICUBIC, box=box), dtype=np.float32)
        grain = random.normal(0, 4, (*image.shape[:2], 1)).astype(np.float32)
        stream = io.BytesIO()
        Image.fromarray(np.clip(image + grain, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=88)
        samples.append({"jpg": stream.getvalue(), "txt": CAPTION.format(i).encode()})
    write_tars(folder, samples, per_shard)


def write_latents(folder: Path, count: int, *, per_shard: int = 1024) -> None:
    from safetensors.numpy import save

    random = np.random.default_rng(0)
    samples = []
    for i in range(count):
        stream = io.BytesIO()
        np.save(stream, random.normal(size=MOMENTS).astype(np.float32))
        row = json.dumps({"caption": CAPTION.format(i), "encoder_sha256": "0" * 64, "text_sha256": "tokens-0"}).encode()
        ids = random.integers(0, 49408, 77).astype(np.int32)
        samples.append(
            {
                "npy": stream.getvalue(),
                "safetensors": save({"ids": ids, "mask": np.ones(77, dtype=bool)}),
                "txt": CAPTION.format(i).encode(),
                "json": row,
            }
        )
    write_tars(folder, samples, per_shard)


def write_tars(folder: Path, samples: list[dict[str, bytes]], per_shard: int) -> None:
    folder.mkdir(parents=True)
    for shard, start in enumerate(range(0, len(samples), per_shard)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i, sample in enumerate(samples[start : start + per_shard]):
                for suffix, content in sample.items():
                    info = tarfile.TarInfo(f"{shard:05d}{i:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def ours(folder: Path, *, size: int | None, workers: int, kind: str = "threads", exact: bool = True) -> Iterator[Any]:
    """Our training stream: shuffled, mirrored, with captions, as bytes until the device."""
    data = ShardDataModule(
        str(folder),
        batch_size=LATENT_BATCH if size is None else BATCH,
        resolution=size,
        flip=size is not None,
        num_workers=workers,
        workers=kind,
        exact_decoding=exact,
    )
    dataset = data.dataset("train")
    order = training_order(dataset, seed=0, block_size=16, batch_size=data.batch_size)
    batches = RankBatches(order, batch_size=data.batch_size)
    for read in data._loader(dataset, batches, substitutes=True):
        yield data.note(read, split="train")


def stock(folder: Path, *, size: int | None, workers: int) -> Iterator[Any]:
    """What open_clip's data.py builds: shuffle buffers, Pillow, torchvision's transforms, batches of tensors."""
    import webdataset as wds
    from torchvision import transforms

    stages: list[Any] = [
        wds.ResampledShards(sorted(map(str, folder.glob("*.tar")))),
        wds.tarfile_to_samples(),
        wds.shuffle(bufsize=1000 if size is None else 64, initial=500 if size is None else 16),
    ]
    if size is None:
        stages += [wds.decode(safetensors_decoder), wds.to_tuple("npy", "safetensors", "txt")]
    else:
        steps = [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
        stages += [wds.decode("pilrgb"), wds.rename(image="jpg;png;jpeg;webp", text="txt")]
        stages += [wds.map_dict(image=transforms.Compose(steps)), wds.to_tuple("image", "text")]
    stages.append(wds.batched(LATENT_BATCH if size is None else BATCH, partial=False))
    pipeline = wds.DataPipeline(*stages)
    yield from wds.WebLoader(
        pipeline, batch_size=None, shuffle=False, num_workers=workers, persistent_workers=workers > 0
    )


def safetensors_decoder(key: str, content: bytes) -> Any:
    from safetensors.numpy import load

    return load(content) if key.endswith("safetensors") else None


def rate(batches: Iterator[Any], count: int, size: int, clock: Callable[[], float]) -> float:
    """Samples a second by a clock, over `count` batches after the first."""
    next(batches)
    start = clock()
    for _ in range(count):
        next(batches)
    return count * size / (clock() - start)


def compare(
    name: str,
    first: Callable[[], Iterator[Any]],
    second: Callable[[], Iterator[Any]],
    *,
    count: tuple[int, int],
    size: int,
    repeats: int,
    clock: Callable[[], float],
) -> None:
    """Print the medians of both rates, and of the ratio of each pair."""
    pairs = []
    for _ in range(repeats):
        pair = []
        for make, num_batches in zip((first, second), count, strict=True):
            batches = make()
            pair.append(rate(batches, num_batches, size, clock))
            batches.close()  # type: ignore[attr-defined]
        pairs.append(pair)
    mine, other = (median(pair[i] for pair in pairs) for i in (0, 1))
    ratios = sorted(a / b for a, b in pairs)
    spread = f"{median(ratios):5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(f"{name:34s} ours {mine:9.1f}/s  stock {other:8.1f}/s  ratio {spread}", flush=True)


def pixel_rates(folder: Path, size: int, arguments: argparse.Namespace) -> None:
    options = {"size": BATCH, "repeats": arguments.repeats}
    counts = (max(2, arguments.images // BATCH), max(2, arguments.images // BATCH // 2))
    compare(
        f"{size} crops, core",
        lambda: ours(folder, size=size, workers=0),
        lambda: stock(folder, size=size, workers=0),
        count=counts,
        clock=time.process_time,
        **options,
    )
    if size == 256:
        compare(
            f"{size} crops, core, scaled DCT",
            lambda: ours(folder, size=size, workers=0, exact=False),
            lambda: stock(folder, size=size, workers=0),
            count=counts,
            clock=time.process_time,
            **options,
        )
    for kind in ("threads", "processes"):
        compare(
            f"{size} crops, both, {kind}",
            lambda kind=kind: ours(folder, size=size, workers=2, kind=kind),
            lambda: stock(folder, size=size, workers=2),
            count=(2 * counts[0], 2 * counts[1]),
            clock=time.perf_counter,
            **options,
        )


def latent_rates(folder: Path, arguments: argparse.Namespace) -> None:
    compare(
        "latents, core",
        lambda: ours(folder, size=None, workers=0),
        lambda: stock(folder, size=None, workers=0),
        count=(arguments.latents // LATENT_BATCH * 4, max(4, arguments.latents // LATENT_BATCH // 2)),
        size=LATENT_BATCH,
        repeats=arguments.repeats,
        clock=time.process_time,
    )


def exactness(folder: Path) -> None:
    """How far our pixels are from Pillow's bicubic ones."""
    for size in (512, 256):
        for exact in (True, False):
            dataset = ShardDataset(str(folder), resolution=size, exact_decoding=exact)
            differences = []
            for i in range(min(8, len(dataset))):
                shard, sample = dataset._locate(i)
                content = dataset._reader.read(
                    dataset.shards[shard].path, *dataset.shards[shard].members(sample)["jpg"]
                )
                image = Image.open(io.BytesIO(content)).convert("RGB")
                scale = size / min(image.size)
                image = image.resize(
                    (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
                )
                left, top = (image.width - size) // 2, (image.height - size) // 2
                expected = np.asarray(image.crop((left, top, left + size, top + size))).astype(int)
                differences.append(np.abs(dataset.read((i, i, 0))["image"].astype(int) - expected))
            worst, mean = max(int(d.max()) for d in differences), float(np.mean([d.mean() for d in differences]))
            kind = "exact" if exact else "scaled DCT"
            print(f"{size} crops, {kind}: at most {worst} levels from Pillow's, {mean:.4f} in the mean")


def alone(folder: Path, which: str, workers: int) -> None:
    """Seconds to the first batch, and memory, in a process of its own."""
    before = memory()
    start = time.perf_counter()
    batches = (ours if which == "ours" else stock)(folder, size=512, workers=workers)
    next(batches)
    first = time.perf_counter() - start
    for _ in range(4):
        next(batches)
    more = memory() - before
    batches.close()
    print(f"{which}, {workers} workers: first batch of {BATCH} after {first:.2f} s; {more:.0f} MiB more memory")


def memory() -> float:
    """MiB of this process and its children, what they share counted once."""
    total = 0
    for process in ["self", *(child.pid for child in multiprocessing.active_children())]:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="pixels-512, pixels-256, latents, exactness or alone")
    parser.add_argument("--alone", nargs=3, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.alone:
        alone(Path(arguments.alone[0]), arguments.alone[1], int(arguments.alone[2]))
        return
    with TemporaryDirectory() as temporary:
        pixels, latents = Path(temporary) / "pixels", Path(temporary) / "latents"
        parts: dict[str, Callable[[], None]] = {
            "exactness": lambda: exactness(pixels),
            "pixels-512": lambda: pixel_rates(pixels, 512, arguments),
            "pixels-256": lambda: pixel_rates(pixels, 256, arguments),
            "latents": lambda: latent_rates(latents, arguments),
            "alone": lambda: run_alone(pixels),
        }
        chosen: Iterable[str] = [arguments.only] if arguments.only else parts
        if set(chosen) - {"latents"}:
            write_pixels(pixels, max(64, arguments.images))
            total = sum(path.stat().st_size for path in pixels.glob("*.tar"))
            print(f"{SIZE[0]} x {SIZE[1]} JPEGs, {total / max(64, arguments.images) / 1024:.0f} KiB each")
        if "latents" in chosen:
            write_latents(latents, arguments.latents)
        for name in chosen:
            parts[name]()


def run_alone(folder: Path) -> None:
    for which in ("ours", "stock"):
        for workers in (0, 2):
            subprocess.run([sys.executable, __file__, "--alone", str(folder), which, str(workers)], check=True)


if __name__ == "__main__":
    main()
