"""How much of a codebook is in use."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class CodebookUsage(Metric):
    """Share of a codebook's entries that occur, and the perplexity of their distribution.

    With p_k the share of all codes that name entry k, usage is the share of k with p_k > 0 and perplexity is
    exp(-sum_k p_k log p_k): the number of entries that would be as varied if used evenly, from 1 to num_codes. Only
    counts are kept, as int64 and added across ranks, so batches and their order make no difference.

    Args:
        num_codes: entries in the codebook.

    Raises:
        ValueError: no codes; in `update`, a code outside [0, num_codes).

    Source: van den Oord et al. 2017; perplexity as measured by Esser et al. 2021.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    parts = ("usage", "perplexity")

    counts: Tensor

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        if num_codes < 1:
            raise ValueError(f"got num_codes={num_codes}, expected the size of a codebook, at least 1")
        self.num_codes = num_codes
        self.add_state("counts", torch.zeros(num_codes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Tensor) -> None:
        """Adds codes of any shape, int64 in [0, num_codes)."""
        lowest, highest = codes.aminmax()
        if lowest < 0 or highest >= self.num_codes:
            raise ValueError(
                f"got codes from {lowest} to {highest}, expected 0 to {self.num_codes - 1}; give the num_codes of "
                "the codebook that they come from"
            )
        self.counts += torch.bincount(codes.flatten(), minlength=self.num_codes)

    def compute(self) -> tuple[Tensor, Tensor]:
        """(Usage in [0, 1], perplexity), float64 scalars."""
        shares = self.counts.double() / self.counts.sum()
        return (shares > 0).double().mean(), torch.exp(-torch.special.xlogy(shares, shares).sum())
