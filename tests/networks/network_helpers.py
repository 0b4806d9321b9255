"""What the tests of several networks share."""

import torch
from torch import Tensor, nn


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """The same normal numbers every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def perturbed(module: nn.Module, *, scale: float = 0.05) -> nn.Module:
    """Move the parameters off zero, so that zero-initialised branches take part."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter += scale * seeded(*parameter.shape, seed=index)
    return module


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
