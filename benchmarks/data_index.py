"""Where everything in a tar lies: our header scan, its kept index, and filtering, beside tarfile and webdataset.

    python benchmarks/data_index.py --samples 30000

The tar is synthetic: a jpg of 2000 bytes, a txt and a json a sample, so that headers are what it costs; it lies in the
page cache. Seconds are those of the processor, the best of three, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from ldm.data.filters import Filter
from ldm.data.index_file import read_index
from ldm.data.kept import judge_shard
from ldm.data.manifest import index_shards
from ldm.data.shards import index_shard

REPEATS = 3


def write(path: Path, num_samples: int) -> None:
    """A shard in the layout of img2dataset."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(num_samples):
            row = json.dumps({"key": f"{i:09d}", "aesthetic": i % 10, "punsafe": 0.0, "caption": "words " * 8}).encode()
            for suffix, content in (("jpg", bytes(2000)), ("txt", b"words " * 8), ("json", row)):
                entry = tarfile.TarInfo(f"{i:09d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def names_of_tarfile(path: Path) -> int:
    """Every member by the standard library, whose headers it reads."""
    with tarfile.open(path, "r:") as tar:
        return len(tar.getmembers())


def samples_of_webdataset(path: Path) -> int:
    """Every sample by webdataset, undecoded, which reads the whole file."""
    import webdataset

    return sum(1 for _ in webdataset.WebDataset(str(path), shardshuffle=False))


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of the best of several runs."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=30_000)
    num_samples = parser.parse_args().samples
    with TemporaryDirectory() as folder:
        path = Path(folder) / "00000.tar"
        write(path, num_samples)
        works: dict[str, Callable[[], object]] = {
            "header scan (index_shard)": lambda: index_shard(path),
            "`ldm data index sha256=false`: scan, faults, files": lambda: index_shards(path, sha256=False, force=True),
            "`ldm data index`: and the hash of the whole file": lambda: index_shards(path, force=True),
            "kept index (read_index)": lambda: read_index(path),
            "filter on two columns of the json (judge_shard)": lambda: judge_shard(
                path, chosen=Filter("aesthetic >= 5 and punsafe < 0.1")
            ),
            "tarfile.getmembers": lambda: names_of_tarfile(path),
            "webdataset, undecoded": lambda: samples_of_webdataset(path),
        }
        print(f"{num_samples} samples of 3 members, {path.stat().st_size / 1e6:.0f} MB, one core\n")
        print("| work | samples/s |\n|---|---:|")
        for name, work in works.items():
            print(f"| {name} | {num_samples / seconds(work):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
