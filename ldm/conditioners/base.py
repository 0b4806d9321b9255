"""The seam of all conditioners."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from ldm.diffusion import Conditioning


class Conditioner(nn.Module, ABC):
    """From what a batch says of its samples to what the network is told."""

    @abstractmethod
    def forward(self, batch: dict[str, Any]) -> Conditioning:
        """The conditions of the B samples of a batch."""

    @abstractmethod
    def null(self, n: int) -> Conditioning:
        """The condition "nothing is known", n times: what condition dropout puts in, and guidance leads away from."""

    def __call__(self, batch: dict[str, Any]) -> Conditioning:
        """`forward`, through the hooks of nn.Module."""
        return super().__call__(batch)
