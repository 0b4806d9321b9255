"""Encoding and decoding in parts, so that memory does not grow with the picture."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.autoencoders.autoencoder import Autoencoder


@torch.no_grad()
def decode_tiled(autoencoder: Autoencoder, latents: Tensor, *, tile: int, overlap: int) -> Tensor:
    """Decode scaled latents (B, C, h, w) of any size tile by tile: images (B, 3, H, W), about in [-1, 1].

    Neighbours share `overlap` latents or more, across which one fades linearly into the other. Where one tile
    suffices this is `autoencoder.decode`. Memory: activations, of which the decoder holds some hundred channels at full
    resolution, are those of one tile (B, C, tile, tile) whatever the picture; only the picture itself grows. Attention
    in the middle costs tile^4 a tile instead of (h w)^2.

    Tiling is not exact: group normalisation and attention see a tile instead of the picture, and a tile's border is
    padded. Measured on random weights at f = 4, two tiles by two: tiles of 24 that overlap by 6 are off by 15 to 17 %
    of the picture's standard deviation (36 to 44 % without overlap), and the steepest column of that error is 0.3 to
    0.4 of the picture's own mean step (1.1 to 1.3); tiles of 64 that overlap by 16 are off by 5 %, and 0.1.

    Args:
        tile: side of a tile in latents; 64 is 512 pixels at f = 8.
        overlap: latents that neighbours share; a quarter of the tile is common.

    Raises:
        ValueError: a tile that is not positive, or an overlap outside [0, tile / 2].
    """
    return _tiled(autoencoder.decode, latents, tile=tile, overlap=overlap, zoom=(autoencoder.downsampling_factor, 1))


@torch.no_grad()
def encode_tiled(autoencoder: Autoencoder, images: Tensor, *, tile: int, overlap: int) -> Tensor:
    """Encode images (B, 3, H, W) in [-1, 1] of any size that divides: unscaled moments (B, M, h, w).

    As `decode_tiled`, with `tile` and `overlap` in latents too: a tile is `tile * downsampling_factor` pixels wide.

    Raises:
        ValueError: also for images outside [-1, 1] or of a size that does not divide.
    """
    autoencoder.check_images(images)
    return _tiled(autoencoder.encode, images, tile=tile, overlap=overlap, zoom=(1, autoencoder.downsampling_factor))


def _tiled(
    convert: Callable[[Tensor], Tensor], source: Tensor, *, tile: int, overlap: int, zoom: tuple[int, int]
) -> Tensor:
    """Sum of the converted tiles, each times its window; added up in float32 at least.

    Args:
        zoom: pixels of the result and of the source to one latent.
    """
    if tile < 1 or not 0 <= overlap <= tile / 2:
        raise ValueError(
            f"got tile={tile} and overlap={overlap}, expected a positive tile and an overlap from 0 to half of it; "
            "64 and 16 suit f = 8"
        )
    out, into = zoom
    height, width = (size // into for size in source.shape[-2:])
    if height <= tile and width <= tile:
        return convert(source)
    total: Tensor | None = None
    for row, row_window in _windows(height, tile, overlap=overlap, zoom=out):
        for column, column_window in _windows(width, tile, overlap=overlap, zoom=out):
            part = convert(source[..., _part(row, tile, into), _part(column, tile, into)])
            if total is None:
                exact = torch.promote_types(part.dtype, torch.float32)
                total = part.new_zeros(*part.shape[:2], height * out, width * out, dtype=exact)
            window = row_window[:, None] * column_window
            total[..., _part(row, tile, out), _part(column, tile, out)] += part * window.to(total)
    assert total is not None, "there are two tiles at least"
    return total.to(part.dtype)


def _windows(size: int, tile: int, *, overlap: int, zoom: int) -> list[tuple[int, Tensor]]:
    """The tiles along one axis, evenly spread: (start in latents, window (zoom * tile,) float64).

    A window rises and falls linearly over what its tile shares with its neighbours; all add up to 1 everywhere.
    """
    tile = min(tile, size)
    count = 1 if size == tile else math.ceil((size - overlap) / (tile - overlap))
    starts = [round(index * (size - tile) / max(count - 1, 1)) for index in range(count)]
    pixels = (torch.arange(size * zoom, dtype=torch.float64) + 0.5) / zoom
    shapes = torch.ones(count, size * zoom, dtype=torch.float64)
    for index, start in enumerate(starts):
        if index > 0 and (shared := starts[index - 1] + tile - start):
            shapes[index] *= ((pixels - start) / shared).clamp(0, 1)
        if index < count - 1 and (shared := start + tile - starts[index + 1]):
            shapes[index] *= ((start + tile - pixels) / shared).clamp(0, 1)
        shapes[index, : start * zoom] = shapes[index, (start + tile) * zoom :] = 0
    shapes /= shapes.sum(0)
    return [(start, shape[_part(start, tile, zoom)]) for start, shape in zip(starts, shapes, strict=True)]


def _part(start: int, tile: int, zoom: int) -> slice:
    return slice(start * zoom, (start + tile) * zoom)
