"""Randomness of what is told of one sample: the same on any device, in any batch."""

import hashlib

import torch


def generator_of(name: str, *, seed: int, position: int) -> torch.Generator:
    """A generator that depends on its arguments alone."""
    digest = hashlib.blake2b(f"{name}/{seed}/{position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
