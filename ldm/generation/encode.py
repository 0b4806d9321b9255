"""Images to latents, once: shards of moments that training reads instead of encoding every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ldm.autoencoders import Autoencoder
from ldm.data import LatentRecord, write_latent_shards


class Splits(Protocol):
    """What holds the images: the data module, or anything with its two members."""

    paths: dict[str, Any]

    def iterate_once(self, split: str, batch_size: int) -> Iterator[dict[str, Any]]: ...


@torch.no_grad()
def encode_dataset(
    autoencoder: Autoencoder,
    data: Splits,
    folder: Path,
    *,
    batch_size: int = 256,
    samples_per_shard: int = 2000,
) -> dict[str, Any]:
    """Writes folder/<split>/ with moments and captions.

    Of a Gaussian posterior these are mean and log-variance, so that sampling noise stays fresh.

    Every shard carries the hash of the autoencoder that made it. Returns the number of samples by split.
    """
    autoencoder.eval()
    encoder_sha256 = weights_sha256(autoencoder)
    summary: dict[str, Any] = {"encoder_sha256": encoder_sha256}
    for split in data.paths:
        records = _records(autoencoder, data.iterate_once(split, batch_size))
        manifest = write_latent_shards(
            folder / split, records, encoder_sha256=encoder_sha256, samples_per_shard=samples_per_shard
        )
        summary[split] = manifest["num_samples"]
    return summary


def weights_sha256(module: nn.Module) -> str:
    """A hash of a module's parameters and buffers, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _records(autoencoder: Autoencoder, batches: Iterator[dict[str, Any]]) -> Iterator[LatentRecord]:
    device = autoencoder.latent_scale.device
    for batch in batches:
        moments = autoencoder.encode(batch["image"].to(device)).float().cpu().numpy()
        columns = {name: value for name, value in batch.items() if name not in _NOT_COLUMNS}
        for i, caption in enumerate(batch["caption"]):
            yield LatentRecord(moments[i], caption, {name: value[i].item() for name, value in columns.items()})


_NOT_COLUMNS = ("image", "caption", "index", "position")
