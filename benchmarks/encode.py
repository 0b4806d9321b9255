"""How fast `ldm data encode` is, and what each part costs: one process, one core, a tiny autoencoder and text encoder.

    python benchmarks/encode.py [--samples 2000] [--side 256]

The identity autoencoder shows what everything but the encoder takes: decoding, scaling, writing, hashing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.autoencoders import Autoencoder, IdentityAutoencoder, KLAutoencoder
from ldm.conditioners import TextTransformer, WordTokenizer
from ldm.data import Record, ShardDataModule, write_shards
from ldm.generation.encode import Settings, encode_dataset


def main() -> None:
    """Prints one line of json for each case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--side", type=int, default=64, help="pixels of the JPEGs, encoded at half of it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = write_pictures(Path(folder) / "pictures", options.samples, options.side)
        tiny = KLAutoencoder(base_channels=8, channel_mult=[1, 2, 4], num_res_blocks=1, norm_groups=4)
        words = WordTokenizer(["picture"], length=16)
        text = TextTransformer(words, width=64, depth=1, num_heads=4).eval()
        cases: dict[str, tuple[Autoencoder, dict[str, object]]] = {
            "identity": (IdentityAutoencoder(), {}),
            "tiny": (tiny, {}),
            "tiny, flips": (tiny, {"flips": True}),
            "tiny, text": (tiny, {"text": text}),
        }
        for name, (autoencoder, settings) in cases.items():
            start = time.perf_counter()
            encode_dataset(autoencoder, data, Path(folder) / name, settings=Settings(readers=0), **settings)  # type: ignore[arg-type]
            rate = options.samples / (time.perf_counter() - start)
            print(json.dumps({"case": name, "side": options.side, "samples_per_second": round(rate)}), flush=True)


def write_pictures(folder: Path, count: int, side: int) -> ShardDataModule:
    """JPEGs of smooth noise, 1000 a shard."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC) for pixels in small]
    records = (Record(pictures[i % len(pictures)], f"picture {i}") for i in range(count))
    write_shards(folder, records, image_format="jpg")
    return ShardDataModule(folder, batch_size=1, resolution=side // 2)


if __name__ == "__main__":
    main()
