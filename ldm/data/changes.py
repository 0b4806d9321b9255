"""What has changed about the data since a checkpoint, shard by shard."""

import hashlib
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ldm.data.shards import ShardIndex

if TYPE_CHECKING:
    from ldm.data.dataset import ShardDataset

# Of the names in a message.
SHOWN = 3


def record(dataset: "ShardDataset", settings: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return what a checkpoint keeps to name changes later: a mark of every shard, and the settings of the order."""
    shards: dict[str, str] = {}
    for path, summary in zip(dataset.shards.paths, dataset.shards.summaries, strict=True):
        name, number = path.name, 2
        while name in shards:  # several sets may number their shards alike
            name, number = f"{path.name} ({number})", number + 1
        shards[name] = summary.mark
    return {"shards": shards, "settings": {name: str(value) for name, value in settings.items()}}


def mark(shard: ShardIndex) -> str:
    """Return "SAMPLES HASH" of a shard, of its first and last key and the sizes of all that is in it."""
    ends = f"{shard.keys[:1]} {shard.keys[-1:]} {shard.suffixes} {shard.offsets[-1:].tolist()}"
    sizes = hashlib.blake2b(shard.sizes.astype("<i8").tobytes(), digest_size=8).hexdigest()
    digest = hashlib.blake2b(f"{ends} {sizes}".encode("utf-8", errors="surrogateescape"), digest_size=6).hexdigest()
    return f"{len(shard)} {digest}"


def refuse(then: Mapping[str, Any], now: Mapping[str, Any], *, allowed: bool) -> None:
    """Refuse to go on where the records differ; where that is allowed, warn instead.

    Raises ValueError with what was added, removed and changed.
    """
    told = differences(then, now)
    if not told:
        return
    line = f"resume: got other training shards, data.filter, data.seed or data.block_size than the checkpoint's: {told}"
    if allowed:
        warnings.warn(f"{line}; going on with them (data.allow_change=true)", stacklevel=2)
        return
    raise ValueError(
        f"{line}; expected the same: put them back, start a new run, or take them as they are with "
        "data.allow_change=true"
    )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say in words how two records differ; empty where they do not."""
    before, after = then.get("shards", {}), now["shards"]
    parts = {
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
        "changed": [
            f"{name} ({_samples(before[name])} -> {_samples(after[name])} samples)"
            for name in after
            if name in before and before[name] != after[name]
        ],
    }
    told = [f"{len(names)} shards {what}: {_listed(names)}" for what, names in parts.items() if names]
    if not told and list(before) != list(after):
        told = ["the same shards in another order"]
    old, new = then.get("settings", {}), now["settings"]
    told += [f"{name} {old.get(name)} -> {new.get(name)}" for name in old | new if old.get(name) != new.get(name)]
    return "; ".join(told)


def _samples(told: str) -> str:
    return told.partition(" ")[0]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
