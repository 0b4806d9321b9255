"""The scale that gives latents unit variance, measured over a whole training set (Rombach et al. 2022, appendix G)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ldm.autoencoders import Autoencoder
from ldm.data import ShardDataModule

# Encoded at once: 256 pictures of 64 x 64, 16 of 256 x 256. More would not fit where the training did.
MAX_PIXELS = 2**20
MAX_IMAGES = 256


@torch.no_grad()
def measure_latent_scale(autoencoder: Autoencoder, data: ShardDataModule) -> tuple[float, float]:
    """(shift, scale) such that (value - shift) * scale has mean 0 and variance 1 over the training set.

    Sums are float64 and over all ranks, so that every rank gets the same numbers whatever its share of the data. The
    variance counts the posterior's own, in closed form.

    Args:
        data: its `iterate_once("train", batch_size)` gives this rank's share, each sample once.
    """
    autoencoder.eval()
    device = autoencoder.latent_scale.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # count, sum, sum of squares
    assert data.resolution is not None, "only shards of images train an autoencoder"
    batch_size = max(1, min(MAX_IMAGES, MAX_PIXELS // data.resolution**2))
    for batch in data.iterate_once("train", batch_size):
        mean, std = autoencoder.mean_and_std(autoencoder.encode(batch["image"].to(device)))
        mean, variance = mean.double(), std.double() ** 2
        sums += torch.stack([mean.new_tensor(mean.numel()), mean.sum(), (mean**2 + variance).sum()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    count, total, squares = sums.tolist()
    shift = total / count
    return shift, (squares / count - shift**2) ** -0.5
