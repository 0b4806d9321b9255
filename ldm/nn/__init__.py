"""Building blocks of the networks: torch and einops only."""

from ldm.nn.attention import (
    GEGLU,
    AttentionBlock,
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    SpatialTransformer,
    zero_module,
)
from ldm.nn.embeddings import timestep_embedding
from ldm.nn.norm import GroupNorm32
from ldm.nn.resnet import Downsample, ResBlock, TimestepSequential, Upsample

__all__ = [
    "GEGLU",
    "AttentionBlock",
    "BasicTransformerBlock",
    "CrossAttention",
    "Downsample",
    "FeedForward",
    "GroupNorm32",
    "ResBlock",
    "SpatialTransformer",
    "TimestepSequential",
    "Upsample",
    "timestep_embedding",
    "zero_module",
]
