"""Cost of resuming in a simulated set of many samples, and quality of the shuffle beside a 10k shuffle buffer's.

    python benchmarks/data_order.py [SAMPLES] [SAMPLES_PER_SHARD]

Prints JSON. Resuming means: the order of 10 million samples built anew and the batch at a random place taken. Nothing
is read from disk: what is timed is all that a checkpoint's one number needs.
"""

import json
import resource
import sys
import time
from statistics import median
from typing import Any

import numpy as np

from ldm.data.order_quality import block_order, buffer_order, measure_order
from ldm.data.position import RankBatches, ShardOrder

BATCH = 1024


def resume_costs(num_samples: int, per_shard: int, *, block_size: int = 16, trials: int = 7) -> dict[str, Any]:
    """Times building the order and taking the first batch at random places, and every batch of a block after it."""
    sizes = [per_shard] * (num_samples // per_shard)
    places = np.random.default_rng(0).integers(0, 3 * num_samples, trials).tolist()
    first, peak = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for place in places:
        started = time.perf_counter()
        order = ShardOrder(sizes, seed=0, block_size=block_size)
        next(iter(RankBatches(order, batch_size=BATCH, position=place // BATCH * BATCH)))
        first.append(time.perf_counter() - started)
    batches = iter(RankBatches(order, batch_size=BATCH, position=0))
    count = max(1, 2 * block_size * per_shard // BATCH)
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
        "resume": resume_costs(num_samples, per_shard),
        "replay": replay_cost(num_samples // 10, per_shard),
        "quality": shuffle_quality(num_samples // 10, per_shard),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
