"""A map of classes as a picture of few channels: LDM's semantic synthesis (Rombach et al. 2022, section 4.3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import nn

from ldm.conditioners.base import Conditioner
from ldm.diffusion import Conditioning
from ldm.nn.arguments import keeps_arguments


class SemanticMap(Conditioner):
    """Conditioning(concat (B, channels, h, w)) of batch["classes"] (B, 1, H, W); dropout leaves it as it is.

    The published `SpatialRescaler`: classes as one-hot channels, halved `num_stages` times by bilinear interpolation,
    then mapped to `channels` by a 1x1 convolution that is trained with the network.

    Args:
        num_classes: of the map; 182 in the published models.
        channels: 3 in the published models.
        num_stages: h = H / 2^num_stages, the size of the latents.

    Raises:
        ValueError: a number out of range.
    """

    always_told = ("concat",)

    @keeps_arguments
    def __init__(self, num_classes: int = 182, *, channels: int = 3, num_stages: int = 2) -> None:
        super().__init__()
        if num_classes < 2 or channels < 1 or num_stages < 0:
            raise ValueError(
                f"got conditioner.num_classes={num_classes}, channels={channels}, num_stages={num_stages}, expected at "
                "least 2, 1 and 0"
            )
        self.map_classes, self.num_stages = num_classes, num_stages
        self.channel_mapper = nn.Conv2d(num_classes, channels, 1, bias=False)

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """Tells of batch["classes"].

        Raises:
            ValueError: the batch has none, or a class out of range.
        """
        if "classes" not in batch:
            raise ValueError(f"got a batch with {sorted(batch)}, expected classes; set derive=semantic_map")
        ids = batch["classes"][:, 0].to(self.channel_mapper.weight.device).long()
        if int(ids.max()) >= self.map_classes:
            raise ValueError(
                f"got a map with class {int(ids.max())}, expected 0 to {self.map_classes - 1}; set "
                "conditioner.num_classes"
            )
        x = F.one_hot(ids, self.map_classes).permute(0, 3, 1, 2).to(self.channel_mapper.weight.dtype)
        for _ in range(self.num_stages):
            x = F.interpolate(x, scale_factor=0.5, mode="bilinear")
        return Conditioning(concat=self.channel_mapper(x))

    def null(self, n: int) -> Conditioning:
        """Nothing: the map is told in any case."""
        return Conditioning()

    def prompt_pair(
        self, prompts: Sequence[str], negatives: Sequence[str], *, image_size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning]:
        """Nothing, twice: what evaluates such a model tells the network of maps of the validation samples."""
        return Conditioning(), Conditioning()
