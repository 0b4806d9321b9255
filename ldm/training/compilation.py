"""Faster forms of the trained network: compiled, and with products of matrices in float8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.config as dynamo
from torch import nn

from ldm.training.sharding import blocks_of


@dataclass(frozen=True)
class Compilation:
    """What `torch.compile` is to make of a network, in place, so that parameters keep their names.

    Args:
        what: "blocks" compiles each block by itself, which takes a fraction of the time where blocks are alike;
            "network" all at once.
        backend, mode, dynamic: of `torch.compile`.

    Raises:
        ValueError: another word for what.
    """

    what: str = "blocks"
    backend: str = "inductor"
    mode: str | None = None
    dynamic: bool | None = None

    def __post_init__(self) -> None:
        if self.what not in ("blocks", "network"):
            raise ValueError(f"compile.what: got {self.what!r}, expected 'blocks' or 'network'")

    def apply(self, network: nn.Module) -> None:
        """Compiles the network, when it is first called.

        Raises:
            ValueError: it has no blocks to compile.
        """
        parts = [network] if self.what == "network" else list(blocks_of(network))
        if not parts:
            raise ValueError(
                f"got compile=blocks with {type(network).__name__}, which has no list of blocks; choose compile=network"
            )
        # Blocks of other widths are graphs of their own, of which torch keeps eight and runs the rest uncompiled.
        dynamo.recompile_limit = max(dynamo.recompile_limit, len(parts) + 8)
        for part in parts:
            part.compile(backend=self.backend, mode=self.mode, dynamic=self.dynamic)


FLOAT8 = ("device", "emulated")


def use_float8(network: nn.Module, kind: str) -> int:
    """Replaces linear layers by ones that multiply in float8, scaled tensor by tensor, and returns how many.

    Parameters stay as they are, with their names. Layers whose widths are not multiples of 16 are left alone, as the
    device's kernels need it.

    Args:
        kind: "device", or "emulated", which rounds as float8 does but multiplies in the usual precision, on any device.

    Raises:
        ValueError: another word, or a device without float8.
        ModuleNotFoundError: torchao is missing.

    Source: Micikevicius et al. 2022, as torchao has it.
    """
    if kind not in FLOAT8:
        raise ValueError(f"float8: got {kind!r}, expected one of {', '.join(FLOAT8)}, or null")
    if kind == "device" and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)):
        raise ValueError("float8: got device, expected a GPU of compute capability 8.9 or more; leave it out here")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # type: ignore[import-untyped]

    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not (module.in_features % 16 or module.out_features % 16)

    convert_to_float8_training(network, module_filter_fn=fits, config=Float8LinearConfig(emulate=kind == "emulated"))
    return sum(is_float8(module) for module in network.modules())


def is_float8(module: Any) -> bool:
    """Whether a layer multiplies in float8."""
    return type(module).__name__ == "Float8Linear"
