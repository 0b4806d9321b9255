"""Losses of the autoencoder: reconstruction, KL, and the patch discriminator's."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def reconstruction_loss(images: Tensor, reconstructions: Tensor, *, per: str = "image") -> Tensor:
    """L1 distance, mean over the batch, and over an image its sum or its mean.

    The sum is the scale to which LDM's kl_weight refers, the mean that of its codebook_weight.

    Args:
        images, reconstructions: (B, 3, H, W).
        per: "image" for the sum, "value" for the mean.

    Raises:
        ValueError: another word.
    """
    error = (images - reconstructions).abs()
    if per == "image":
        return error.flatten(1).sum(1).mean()
    if per == "value":
        return error.mean()
    raise ValueError(f"got per={per!r}, expected 'image' or 'value'; choose one of them")


def discriminator_hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Mean of max(0, 1 - D(x)) and max(0, 1 + D(x^)) over patches (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """-D(x^), mean over patches."""
    return -fake.mean()


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, *, scales: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """Ratio of the two losses' gradients at the decoder's last layer (Esser et al. 2021, eq. 7), without gradient.

    The gradients are those of the global batch, so that every rank gets the same weight.

    Args:
        reconstruction, adversarial: the losses.
        last_layer: the weight of the decoder's last layer.
        scales: what the losses are multiplied by, and their gradients divided by, as of `half_precision_scales`.
    """
    losses = (reconstruction, adversarial)
    gradients = torch.stack(
        [
            torch.autograd.grad(scale * loss, last_layer, retain_graph=True)[0] / scale
            for scale, loss in zip(scales, losses, strict=True)
        ]
    )
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(gradients)
        gradients /= dist.get_world_size()
    gradient_r, gradient_a = gradients
    return (gradient_r.norm() / (gradient_a.norm() + 1e-4)).clamp(0, 1e4)


def half_precision_scales(images: Tensor, *, per: str) -> tuple[float, float]:
    """Scales of a reconstruction loss and of a mean over patches with which float16 holds both losses' gradients.

    A pixel's part in them is then about one over the image's side: the sum over all pixels stays below float16's
    largest number, and each part above its smallest. Powers of two, so that other precisions are not rounded anew.

    Args:
        images: (B, 3, H, W).
        per: what the reconstruction loss is, as `reconstruction_loss` has it.
    """
    side = 2.0 ** round(math.log2(images[0, 0].numel()) / 2)
    return (1 / side if per == "image" else side), side
