"""Data: digits, shards and the exact, resumable stream of batches that training reads."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.data.datamodule import ShardDataModule
    from ldm.data.dataset import ShardDataset, collate
    from ldm.data.digits import write_digits
    from ldm.data.ledger import BadDataError
    from ldm.data.position import RankBatches, ShardOrder
    from ldm.data.remote import ShardCache
    from ldm.data.shards import CorruptSampleError, ShardIndex, index_shard, resolve_shards
    from ldm.data.stream import StreamSettings
    from ldm.data.writer import LatentRecord, Record, read_manifest, write_latent_shards, write_shards

# Loaded on first use: writing digits needs neither torch nor Lightning, whose imports take seconds.
_HOMES = {
    "BadDataError": "ledger",
    "ShardCache": "remote",
    "ShardDataModule": "datamodule",
    "StreamSettings": "stream",
    "ShardDataset": "dataset",
    "collate": "dataset",
    "write_digits": "digits",
    "RankBatches": "position",
    "ShardOrder": "position",
    "CorruptSampleError": "shards",
    "ShardIndex": "shards",
    "index_shard": "shards",
    "resolve_shards": "shards",
    "LatentRecord": "writer",
    "Record": "writer",
    "read_manifest": "writer",
    "write_latent_shards": "writer",
    "write_shards": "writer",
}

__all__ = [
    "BadDataError",
    "CorruptSampleError",
    "LatentRecord",
    "RankBatches",
    "Record",
    "ShardCache",
    "ShardDataModule",
    "ShardDataset",
    "ShardIndex",
    "ShardOrder",
    "StreamSettings",
    "collate",
    "index_shard",
    "read_manifest",
    "resolve_shards",
    "write_digits",
    "write_latent_shards",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm.data' has no attribute {name!r}")
    return getattr(import_module(f"ldm.data.{_HOMES[name]}"), name)
