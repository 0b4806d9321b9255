"""Adaptive layer normalisation: a vector shifts, scales and gates what happens to tokens."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attention import zero_module


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """tokens (B, N, D) times 1 + scale (B, D), plus shift (B, D)."""
    return tokens * (1 + scale[:, None]) + shift[:, None]


class PlainLayerNorm(nn.LayerNorm):
    """Layer normalisation of tokens (B, N, width) without weights of its own, eps 1e-6: a modulation follows it."""

    def __init__(self, width: int) -> None:
        super().__init__(width, elementwise_affine=False, eps=1e-6)


class Modulation(nn.Sequential):
    """A vector (B, vector_dim) to `parts` vectors (B, width) that all start at zero (Peebles and Xie 2023, adaLN-Zero).

    The vector is as wide as the tokens where nothing else is said.
    """

    def __init__(
        self,
        width: int,
        parts: int,
        *,
        vector_dim: int | None = None,
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(activation(), zero_module(nn.Linear(vector_dim or width, parts * width)))
        self.parts = parts

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Give the parts."""
        return super().forward(vector).chunk(self.parts, dim=-1)


class ModulatedHead(nn.Module):
    """The last layer of a diffusion transformer: tokens (B, N, width) under a vector (B, width) to (B, N, dim_out).

    It starts at zero. Source: Peebles and Xie 2023, section 3.2.
    """

    def __init__(self, width: int, dim_out: int) -> None:
        super().__init__()
        self.adaLN_modulation = Modulation(width, 2)
        self.norm_final: nn.LayerNorm = PlainLayerNorm(width)
        self.linear = zero_module(nn.Linear(width, dim_out))

    def forward(self, tokens: Tensor, vector: Tensor) -> Tensor:
        """Map every token."""
        shift, scale = self.adaLN_modulation(vector)
        return self.linear(modulate(self.norm_final(tokens), shift, scale))


class MLP(nn.Module):
    """Two layers with the tanh approximation of GELU between them: (B, N, width) to (B, N, width)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map every token by itself."""
        return self.fc2(F.gelu(self.fc1(tokens), approximate="tanh"))
