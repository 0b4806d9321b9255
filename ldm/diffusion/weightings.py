"""Loss weights as functions of the signal-to-noise ratio, each in the space in which its paper states it.

`Denoiser.loss` carries a weight over to the squared error of the network's output, so that a weighting means the
same thing for every parameterization.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

Space = Literal["output", "x_0", "eps"]


class Weighting(ABC):
    """A weight per sample.

    Attributes:
        space: the quantity whose squared error is weighted: the network's output, x_0 or eps.
    """

    space: Space

    @abstractmethod
    def __call__(self, snr: Tensor) -> Tensor:
        """Weights (B,) from signal-to-noise ratios (B,) in [0, inf]."""


class Unit(Weighting):
    """The plain squared error of the network's output."""

    space: Space = "output"

    def __call__(self, snr: Tensor) -> Tensor:
        return torch.ones_like(snr)


class MinSNR(Weighting):
    """min(SNR, gamma) on the error of x_0 (Hang et al. 2023, eq. 11): finite also where SNR = 0."""

    space: Space = "x_0"

    def __init__(self, *, gamma: float = 5.0) -> None:
        if gamma <= 0:
            raise ValueError(f"got weighting.gamma={gamma}, expected a positive number")
        self.gamma = gamma

    def __call__(self, snr: Tensor) -> Tensor:
        return snr.clamp(max=self.gamma)


class P2(Weighting):
    """1 / (k + SNR)^gamma on the error of eps (Choi et al. 2022, eq. 8)."""

    space: Space = "eps"

    def __init__(self, *, gamma: float = 1.0, k: float = 1.0) -> None:
        if k <= 0:
            raise ValueError(f"got weighting.k={k}, expected a positive number: k = 0 divides by zero where SNR = 0")
        self.gamma, self.k = gamma, k

    def __call__(self, snr: Tensor) -> Tensor:
        return (self.k + snr) ** -self.gamma


class EDM(Weighting):
    """SNR + 1 / sigma_data^2 on the error of x_0 (Karras et al. 2022, lambda(sigma) of table 1)."""

    space: Space = "x_0"

    def __init__(self, *, sigma_data: float = 0.5) -> None:
        if sigma_data <= 0:
            raise ValueError(f"got weighting.sigma_data={sigma_data}, expected a positive number")
        self.sigma_data = sigma_data

    def __call__(self, snr: Tensor) -> Tensor:
        return snr + self.sigma_data**-2
