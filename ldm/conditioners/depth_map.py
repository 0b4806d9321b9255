"""How near everything in a picture is, as a picture of one channel: Stable Diffusion 2's depth model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate

from ldm.conditioners.base import Conditioner
from ldm.diffusion import Conditioning
from ldm.nn.arguments import keeps_arguments


class DepthMap(Conditioner):
    """Conditioning(concat (B, 1, h, w)) of batch["depth"] (B, 1, H, W), brighter where nearer; dropout leaves it.

    Each map is brought to the size of the latents by bicubic interpolation, and its range to [-1, 1], as
    `ldm.generation.ImageToImage` tells a depth model.

    Args:
        factor: H / h, the autoencoder's.

    Raises:
        ValueError: a factor below 1.
    """

    always_told = ("concat",)

    @keeps_arguments
    def __init__(self, factor: int = 8) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"got conditioner.factor={factor}, expected the autoencoder's downsampling factor")
        self.factor = factor

    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """Tells of batch["depth"]; one that is the same everywhere is told as 0.

        Raises:
            ValueError: the batch has none.
        """
        if "depth" not in batch:
            raise ValueError(f"got a batch with {sorted(batch)}, expected depth; set derive=depth_map")
        depth: Tensor = batch["depth"]
        size = [side // self.factor for side in depth.shape[-2:]]
        small = interpolate(depth, size=size, mode="bicubic", align_corners=False)
        low, high = small.amin((1, 2, 3), keepdim=True), small.amax((1, 2, 3), keepdim=True)
        span = high - low
        scaled = 2 * (small - low) / span.clamp_min(1e-6) - 1
        return Conditioning(concat=scaled.where(span > 0, 0.0))

    def null(self, n: int) -> Conditioning:
        """Nothing: the map is told in any case."""
        return Conditioning()

    def prompt_pair(
        self, prompts: Sequence[str], negatives: Sequence[str], *, image_size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning]:
        """Nothing, twice: the task tells the network of the map."""
        return Conditioning(), Conditioning()
