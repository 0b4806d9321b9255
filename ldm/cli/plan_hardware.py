"""What GPUs and the wires between them can do, by their makers' figures; conf/hardware and conf/interconnect."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of GPU, in nodes of several.

    Args:
        title: what people call it.
        bf16, fp16, tf32, fp32, fp8: peak of dense products in TFLOP/s; fp8 is None where there is none.
        achieved: share of the peak that a large bf16 product reaches.
        memory_gib: what a process can use.
        bandwidth_tb: of the memory, TB/s.
        nvlink_gb: from one GPU to the others of its node, GB/s each way.
        network_gb: from one GPU to other nodes, GB/s each way.
        gpus_per_node, cores_per_node: the usual node.

    Raises:
        ValueError: a figure is not positive.
    """

    title: str
    bf16: float
    fp16: float
    tf32: float
    fp32: float
    fp8: float | None
    achieved: float
    memory_gib: float
    bandwidth_tb: float
    nvlink_gb: float
    network_gb: float
    gpus_per_node: int
    cores_per_node: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and value <= 0:
                raise ValueError(f"hardware.{name}: got {value}, expected a positive number")

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.memory_gib * 2**30


@dataclass(frozen=True, kw_only=True)
class Interconnect:
    """What joins nodes.

    Args:
        title: what people call it.
        network_gb: from one GPU to other nodes, GB/s each way: a node's, over its GPUs.
        latency_us: of one message, microseconds.

    Raises:
        ValueError: a figure is not positive.
    """

    title: str
    network_gb: float
    latency_us: float

    def __post_init__(self) -> None:
        if self.network_gb <= 0 or self.latency_us <= 0:
            raise ValueError(
                f"interconnect: got {self.network_gb} GB/s and {self.latency_us} us, expected positive numbers"
            )
