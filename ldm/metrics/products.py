"""Products of features, a block at a time: symmetric ones at little more than half their price, and sums over kernels.

All in float64. Blocks are large enough for the processor's full speed, and small beside the features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 512


def add_gram_(total: Tensor, features: Tensor) -> None:
    """Adds X^T X of features X (N, D) to a total (D, D), float64, in place; below the diagonal it means nothing.

    `both_halves` gives the whole total. To add up in place saves a matrix a batch, which for few images is most of it.
    """
    wide = features.double()
    size = wide.shape[1]
    for top in range(0, size, BLOCK):
        rows = slice(top, top + BLOCK)
        for left in range(top, size, BLOCK):
            columns = slice(left, left + BLOCK)
            total[rows, columns].addmm_(wide[:, rows].T, wide[:, columns])


def both_halves(total: Tensor) -> Tensor:
    """The symmetric matrix (D, D) of which a total holds the upper half."""
    return total.triu() + total.triu(1).T


def pair_sums(
    kernel: Callable[[Tensor, Tensor], Tensor],
    a: Tensor,
    b: Tensor | None = None,
    *,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """sum_ij u_is k(a_i, b_j) v_js for each s, float64 (S,), with no more than BLOCK^2 kernel values at once.

    Args:
        kernel: from (n, D) and (m, D), float64, to (n, m), which it gives away.
        a: features (N, D).
        b: features (M, D); None for those of `a`, where no image counts beside itself: i != j.
        weights: u (N, S) and v (M, S), float64, the same where b is None; None = ones, S = 1.
    """
    others = a if b is None else b
    u, v = weights or (torch.ones(len(x), 1, dtype=torch.float64, device=a.device) for x in (a, others))
    total = torch.zeros(u.shape[1], dtype=torch.float64, device=a.device)
    for top in range(0, len(a), BLOCK):
        rows = slice(top, top + BLOCK)
        x = a[rows].double()
        for left in range(top if b is None else 0, len(others), BLOCK):
            columns = slice(left, left + BLOCK)
            values = kernel(x, others[columns].double())
            if b is None and left == top:
                values.fill_diagonal_(0)
            part = (u[rows] * (values @ v[columns])).sum(dim=0)
            # What lies below the diagonal mirrors what lies above.
            total += 2 * part if b is None and left > top else part
    return total
