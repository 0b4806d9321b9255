"""Distances between features, a block at a time: what precision, recall, density and coverage rest on.

Squared distances are taken in float64, where |x|^2 + |y|^2 - 2 x.y keeps near duplicates apart; in float32 the
rounding of far-off features would swallow them. No more than chunk_size^2 distances exist at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def blocks(a: Tensor, b: Tensor, chunk_size: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows of `a`, rows of `b` and their squared distances, float64, for features (N, D) and (M, D)."""
    for start in range(0, len(a), chunk_size):
        rows = slice(start, start + chunk_size)
        x = a[rows].double()
        x_squares = x.square().sum(dim=1)[:, None]
        for other in range(0, len(b), chunk_size):
            columns = slice(other, other + chunk_size)
            y = b[columns].double()
            squares = torch.addmm(x_squares + y.square().sum(dim=1), x, y.T, alpha=-2)
            yield rows, columns, squares.clamp_min_(0)


def neighbour_radii(features: Tensor, k: int, *, chunk_size: int) -> Tensor:
    """Squared distance (N,) of each of the features (N, D) to its k-th nearest other, float64.

    Raises:
        ValueError: no more than k features.
    """
    if len(features) <= k:
        raise ValueError(f"got {len(features)} images, expected more than k={k}; give more images or a smaller k")
    radii = torch.empty(len(features), dtype=torch.float64, device=features.device)
    nearest = radii.new_empty(0, k)
    for rows, columns, squares in blocks(features, features, chunk_size):
        if columns.start == 0:
            nearest = squares.new_full((len(squares), k), torch.inf)
        if rows == columns:
            squares.fill_diagonal_(torch.inf)
        candidates = squares.topk(min(k, squares.shape[1]), dim=1, largest=False).values
        nearest = torch.cat([nearest, candidates], dim=1).topk(k, dim=1, largest=False).values
        radii[rows] = nearest[:, -1]
    return radii
