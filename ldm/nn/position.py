"""Sine-cosine embeddings of positions on a grid, computed for any size instead of kept in a table."""

import torch
from torch import Tensor

from ldm.nn.embeddings import timestep_embedding


def sincos_grid(rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """Embed a grid of positions, rows (H,) by columns (W,), as (H W, dim): row-major, as `PatchEmbedding` gives tokens.

    The first half of the channels tells the column, the second the row; each half holds its sines, then its cosines,
    of 10000^(-i/(dim/4)) times the position. Raises ValueError unless dim is a positive multiple of 4.
    Source: Dosovitskiy et al. 2021; the layout of Peebles and Xie 2023, which the published weights rely on.
    """
    if dim < 4 or dim % 4:
        raise ValueError(f"got {dim} channels for positions in two dimensions, expected a multiple of 4; change width")
    of_rows = _sines_first(rows, dim // 2)[:, None].expand(-1, len(columns), -1)
    of_columns = _sines_first(columns, dim // 2)[None].expand(len(rows), -1, -1)
    return torch.cat([of_columns, of_rows], dim=-1).flatten(0, 1)


def centred_positions(size: int, *, max_positions: int, step: float, device: torch.device | None = None) -> Tensor:
    """The middle `size` of `max_positions` positions that lie `step` apart, from 0: (size,) float32.

    Images of every size share the centre of the grid, and a network sees no position beyond those it was built for.
    Raises ValueError for a size above max_positions. Source: Esser et al. 2024, "Positional encoding".
    """
    if size > max_positions:
        raise ValueError(
            f"got {size} patches along a side, expected at most {max_positions}; make the image smaller, or raise "
            "max_positions"
        )
    first = (max_positions - size) // 2
    return torch.arange(first, first + size, dtype=torch.float32, device=device) * step


def _sines_first(positions: Tensor, dim: int) -> Tensor:
    cosines, sines = timestep_embedding(positions, dim).chunk(2, dim=-1)
    return torch.cat([sines, cosines], dim=-1)
