"""What fits a large model into a small memory: half precision, tiles, and weights that wait outside the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm.autoencoders import Autoencoder, decode_safely, decode_tiled, encode_tiled
from ldm.diffusion import Conditioning

# What the autoencoder works on at once: 3.5 GiB for Stable Diffusion's in float32, which takes 0.86 at 512 x 512.
MAX_PIXELS = 4 * 512 * 512


@dataclass(frozen=True)
class Memory:
    """How the parts of a model come to the device, and how pictures go through the autoencoder.

    Args:
        tile: encode and decode one picture at a time, in tiles of so many latents a side; null: whole,
            and as many at once as have `MAX_PIXELS`, but one at least.
        offload: weights wait in main memory. The network's layers come to the device one at a time, as they run, and
            the conditioner and the autoencoder for as long as they work.

    Raises:
        ValueError: a tile too small to share a quarter with its neighbours.
    """

    tile: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.tile is not None and self.tile < 4:
            raise ValueError(f"got memory.tile={self.tile}, expected at least 4 latents; 64 fits most cards")

    @contextmanager
    def at_work(self, part: nn.Module, device: torch.device) -> Iterator[None]:
        """Brings a part of the model to the device for as long as it works."""
        if not self.offload:
            yield
            return
        part.to(device)
        try:
            yield
        finally:
            part.to("cpu")

    def encode(self, autoencoder: Autoencoder, images: Tensor) -> Tensor:
        """Moments (B, M, h, w) of images (B, 3, H, W), computed in float32: it is done once, and half may overflow."""
        dtype = dtype_of(autoencoder)
        cast_parameters(autoencoder, torch.float32)
        try:
            with torch.autocast(images.device.type, enabled=False):
                encode = autoencoder.encode
                if self.tile is not None:
                    encode = partial(encode_tiled, autoencoder, tile=self.tile, overlap=self.tile // 4)
                return torch.cat([encode(part) for part in images.split(self._at_once(*images.shape[-2:]))])
        finally:
            cast_parameters(autoencoder, dtype)

    def decode(self, autoencoder: Autoencoder, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) of latents (B, C, h, w)."""
        latents = latents.to(dtype_of(autoencoder))
        decode = None if self.tile is None else partial(decode_tiled, tile=self.tile, overlap=self.tile // 4)
        height, width = (side * autoencoder.downsampling_factor for side in latents.shape[-2:])
        parts = latents.split(self._at_once(height, width))
        return torch.cat([decode_safely(autoencoder, part, decode=decode) for part in parts])

    def _at_once(self, height: int, width: int) -> int:
        """How many pictures of so many pixels go through the autoencoder at once."""
        return max(1, MAX_PIXELS // (height * width)) if self.tile is None else 1


def halve(network: nn.Module, *, conditioner: nn.Module, autoencoder: Autoencoder, device: torch.device) -> None:
    """Turns weights into float16, or bfloat16 on the CPU, in place; sampling itself stays in float32."""
    dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
    network.to(dtype).register_forward_pre_hook(_cast_inputs)
    conditioner.to(dtype)
    # The scale of the latents stays exact.
    cast_parameters(autoencoder, dtype)


def offload(network: nn.Module, device: torch.device) -> None:
    """Keeps a network's weights in main memory, from where each layer's come to the device when it runs."""
    # Takes a second, and only this needs it.
    from accelerate import cpu_offload  # type: ignore[import-untyped]

    cpu_offload(network.to("cpu"), execution_device=device)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The type of a module's weights; float32 where it has none."""
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Changes the type of a module's parameters, in place, but not of its buffers."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _cast_inputs(network: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gives a network x and its conditions in the type of its weights; times keep theirs, as large ones need digits."""
    x, t, cond = arguments
    dtype = dtype_of(network)
    parts = {name: part.to(dtype) if part.is_floating_point() else part for name, part in cond.parts().items()}
    return x.to(dtype), t, Conditioning(**parts)
