"""Normalisation shared by every network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm32(nn.GroupNorm):
    """Group normalisation whose statistics are never taken in half precision.

    Takes and gives (B, C, ...) in the dtype of the input. The U-Net uses eps 1e-5, the autoencoder and the
    spatial transformer 1e-6. Raises ValueError when the channels do not divide into the groups.
    Source: Wu and He 2018; float32 statistics as in Dhariwal and Nichol 2021.
    """

    def __init__(self, channels: int, *, groups: int = 32, eps: float = 1e-5) -> None:
        if groups < 1 or channels < 1 or channels % groups:
            raise ValueError(
                f"got {channels} channels for {groups} normalisation groups, expected a multiple of the groups; "
                "change the channels or norm_groups"
            )
        super().__init__(groups, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, ...)."""
        if x.dtype not in (torch.float16, torch.bfloat16):
            return super().forward(x)
        normed = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(x.dtype)
