"""`ldm encode`: image shards to latent shards, so that training need not encode every picture in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from ldm.cli.build import build
from ldm.cli.chain import run_chain, shown
from ldm.cli.console import say
from ldm.cli.errors import UserError, user_mistakes
from ldm.cli.run_folder import RunFolder
from ldm.cli.sampling import usable_device


def encode(config: DictConfig, overrides: Sequence[str]) -> None:
    """Encodes and says where the shards are."""
    folder = run_chain("encode", config, overrides)
    say(f"latent shards: {shown(folder.path)}")


def produce(folder: RunFolder) -> dict[str, Any]:
    """Encodes every split of the data into the run folder.

    Raises:
        UserError: autoencoder or data is missing or wrong.
    """
    config = folder.config
    for part in ("autoencoder", "data"):
        if config.get(part) is None:
            raise UserError(f"{part}: {config.name} sets none, so there is nothing to encode; choose {part}=...")
    from ldm.generation.encode import encode_dataset

    with user_mistakes():
        autoencoder, data = build(config.autoencoder).to(usable_device(config.device)), build(config.data)
        summary = encode_dataset(
            autoencoder, data, folder.path, batch_size=config.batch_size, samples_per_shard=config.samples_per_shard
        )
    return {"summary": summary}
