"""Cost of resuming in a simulated set of many samples, and quality of the shuffle beside a 10k shuffle buffer's.

    python benchmarks/data_order.py [SAMPLES] [SAMPLES_PER_SHARD]

Prints JSON. Resuming means: the order of 10 million samples built anew and the batch at a random place taken; nothing
is read from disk for it. Then the same in batches of one bucket each, and what the indices of as many samples take to
be opened and to be held: each shard's is a file of three members a sample.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ldm.data.buckets import BucketOrder
from ldm.data.index_file import index_path, read_index, save_index
from ldm.data.indices import HELD_SAMPLES, ShardIndices
from ldm.data.order_quality import block_order, buffer_order, measure_order
from ldm.data.position import Order, RankBatches, ShardOrder
from ldm.data.shards import ShardIndex

BATCH = 1024


def resume_costs(num_samples: int, per_shard: int, *, num_buckets: int = 0, trials: int = 7) -> dict[str, Any]:
    """Times building the order and taking the first batch at random places, and every batch of a block after it."""
    sizes = [per_shard] * (num_samples // per_shard)
    rng = np.random.default_rng(0)
    places = rng.integers(0, 3 * num_samples, trials).tolist()
    buckets = rng.integers(0, num_buckets, num_samples).astype(np.int16) if num_buckets else None

    def order() -> Order:
        whole = ShardOrder(sizes, seed=0)
        return whole if buckets is None else BucketOrder(whole, buckets, batch_size=BATCH)

    first, peak = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for place in places:
        started = time.perf_counter()
        next(iter(RankBatches(order(), batch_size=BATCH, position=place // BATCH * BATCH)))
        first.append(time.perf_counter() - started)
    batches = iter(RankBatches(order(), batch_size=BATCH, position=0))
    next(batches)
    count = max(1, 32 * per_shard // BATCH)
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    per_batch = (time.perf_counter() - started) / count
    return {
        "samples": num_samples,
        "shards": len(sizes),
        "state_bytes": 8,
        "seconds_to_first_batch_median": median(first),
        "seconds_to_first_batch_worst": max(first),
        "microseconds_per_sample_of_order": per_batch / BATCH * 1e6,
        "peak_memory_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024,
    }


def index_costs(num_samples: int, per_shard: int) -> dict[str, dict[str, float]]:
    """Times opening the indices kept beside all shards, and measures what a process holds of them after an epoch."""
    with TemporaryDirectory() as folder:
        shards = [Path(folder) / f"{number:05d}.tar" for number in range(num_samples // per_shard)]
        offsets = np.arange(3 * per_shard, dtype=np.int64).reshape(-1, 3) * 1024
        keys = tuple(f"{i:09d}" for i in range(per_shard))
        stamp = (int(offsets[-1, -1]) + 1024, 0)
        made = ShardIndex(shards[0], keys, ("jpg", "txt", "json"), offsets, np.full_like(offsets, 500))
        saved = save_index(made, stamp=stamp)
        for shard in shards[1:]:
            os.link(saved, index_path(shard))
        work = {f"{HELD_SAMPLES:,} samples held": HELD_SAMPLES, "all held": num_samples}
        return {
            name: in_child(lambda held=held: _opened(shards, stamp, held))  # type: ignore[misc]
            for name, held in work.items()
        }


def _opened(shards: list[Path], stamp: tuple[int, int], held: int) -> dict[str, float]:
    before, started = _resident_mb(), time.perf_counter()
    indices = ShardIndices(held_samples=held)
    for shard in shards:
        index = read_index(shard, stamp=stamp)
        assert index is not None
        indices.append(index)
    opened = time.perf_counter() - started
    count = sum(len(index.keys) for index in indices)
    return {
        "samples": count,
        "seconds_to_open": opened,
        "seconds_to_pass_once_more": time.perf_counter() - started - opened,
        "memory_mb": _resident_mb() - before,
    }


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def in_child(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Returns what work in a process of its own returns, so that no memory of an earlier one is counted."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        with os.fdopen(writer, "w") as told:
            json.dump(work(), told)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        found: dict[str, float] = json.load(told)
    os.waitpid(child, 0)
    return found


def replay_cost(num_samples: int, per_shard: int) -> dict[str, float]:
    """Times what a stream with a shuffle buffer has to do to come to the middle of an epoch: pass all before it."""
    sizes = [per_shard] * (num_samples // per_shard)
    started = time.perf_counter()
    buffer_order(sizes, buffer=10_000)
    return {"seconds_to_the_middle_without_reading": (time.perf_counter() - started) / 2}


def shuffle_quality(num_samples: int, per_shard: int) -> dict[str, dict[str, float]]:
    """Measures the orders of a smaller set: ours with blocks of 1, 16 and 64 shards, buffers, and a full shuffle."""
    sizes = [per_shard] * (num_samples // per_shard)
    orders = {f"blocks of {block} shards": block_order(sizes, block_size=block) for block in (1, 16, 64)}
    orders |= {f"buffer of {size}": buffer_order(sizes, buffer=size) for size in (1_000, 10_000)}
    orders["full shuffle"] = np.random.default_rng(0).permutation(sum(sizes))
    return {name: measure_order(order, sizes).as_json() for name, order in orders.items()}


def main() -> None:
    num_samples = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    per_shard = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    found = {
        "indices": index_costs(num_samples, per_shard),
        "resume": resume_costs(num_samples, per_shard),
        "resume in 40 buckets": resume_costs(num_samples, per_shard, num_buckets=40),
        "replay": replay_cost(num_samples // 10, per_shard),
        "quality": shuffle_quality(num_samples // 10, per_shard),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
