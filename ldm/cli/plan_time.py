"""Seconds of a training step: arithmetic, memory traffic, kernels, communication, and data."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from ldm.cli.plan_count import ATTENTION, CONVOLUTION, LINEAR, Amount
from ldm.cli.plan_hardware import Hardware, Interconnect
from ldm.cli.plan_memory import Settings, Strategy, optimizer_bytes
from ldm.cli.plan_work import Work

TERA, GIGA, MICRO = 1e12, 1e9, 1e-6
FLOAT, HALF = 4, 2
# DDP's buckets, and the optimizer's and the average's bytes a parameter besides the optimizer's state.
BUCKET = 25 * 2**20
STEP_BYTES, AVERAGE_BYTES = 12, 12
PCIE = 25 * GIGA
# Measured on one core of a Zen 4: pictures decoded, cropped and scaled to 512 pixels of about a megapixel (a picture of
# the size planned for costs its own pixels), and moments copied into a batch.
MEGAPIXELS_PER_SECOND, SAMPLES_PER_SECOND = 180 * 1.03, 20000


@dataclass(frozen=True, kw_only=True)
class Stack:
    """How well software uses a device; from published runs, see `ldm.cli.plan_published`.

    Args:
        arithmetic: share of what a large product achieves.
        traffic: bytes moved over those counted for operators one by one.
        kernel_us: device time of an operator that does almost nothing, microseconds.
    """

    arithmetic: float
    traffic: float
    kernel_us: float


@dataclass(frozen=True, kw_only=True)
class Wires:
    """How well collectives use the wires.

    Args:
        share: of the wires' figure that a ring reaches while the device computes.
        overlap: share of the backward pass beside which gradients travel.
        memory: share of the memory's bandwidth that copies reach.
    """

    share: float
    overlap: float
    memory: float


# Fitted on three published rows, one constant each, which `ldm plan check=true` marks: arithmetic of "eager" on
# MosaicML's 512 px on 8 A100, of "tuned" on MLPerf's 8 H100, kernel_us on MLPerf's 512 H100. Traffic of fused operators
# is 2.27 GB of 8.1 GB counted for an image of 512 px. "compiled" is "eager" with that traffic: not fitted.
_KERNEL_US = 5.71
STACKS = {
    "eager": Stack(arithmetic=0.473, traffic=1.0, kernel_us=_KERNEL_US),
    "compiled": Stack(arithmetic=0.473, traffic=0.28, kernel_us=_KERNEL_US),
    "tuned": Stack(arithmetic=0.534, traffic=0.28, kernel_us=_KERNEL_US),
}
# Assumed, but for memory: 3.0 of 3.35 TB/s were measured on an H100. No published row shows communication that a ring
# on the network assumed for it would not hide.
WIRES = Wires(share=0.6, overlap=0.7, memory=0.9)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run goes."""

    hardware: Hardware
    gpus: int
    interconnect: Interconnect | None = None
    wires: Wires = WIRES

    @property
    def nodes(self) -> int:
        """Machines."""
        return ceil(self.gpus / self.hardware.gpus_per_node)

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a ring over all devices: the slower of NVLink and a node's network."""
        nvlink = self.hardware.nvlink_gb * GIGA
        if self.nodes == 1:
            return nvlink * self.wires.share
        each = self.interconnect.network_gb if self.interconnect else self.hardware.network_gb
        return min(nvlink, each * GIGA * self.hardware.gpus_per_node) * self.wires.share

    @property
    def latency(self) -> float:
        """Seconds before a collective's first byte."""
        between = self.interconnect.latency_us if self.interconnect else 5.0
        return MICRO * (2 * log2(max(2, self.hardware.gpus_per_node)) + 2 * between * log2(max(1, self.nodes)))


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Of one optimizer step, by what they go to; `waiting` for communication is what is not hidden."""

    arithmetic: float
    traffic: float
    kernels: float
    optimizer: float
    communication: float
    waiting: float
    data: float

    @property
    def computing(self) -> float:
        """All that the device does itself."""
        return self.arithmetic + self.traffic + self.kernels + self.optimizer

    @property
    def step(self) -> float:
        """A step, for which data are read beside it."""
        return max(self.computing + self.waiting, self.data)

    @property
    def bottleneck(self) -> str:
        """What most of the time goes to."""
        if self.data > self.computing + self.waiting:
            return "data"
        names = ("arithmetic", "traffic", "kernels", "optimizer", "waiting")
        words = {"waiting": "communication", "traffic": "memory traffic", "kernels": "small kernels"}
        name = max(names, key=lambda one: getattr(self, one))
        return words.get(name, name)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is run.

    Args:
        precision: the trainer's.
        micro_batch, accumulate: of one device.
        cores: of one device, that read data.
        float8: linear layers in float8.
    """

    precision: str
    micro_batch: int
    accumulate: int
    settings: Settings
    strategy: Strategy
    stack: Stack
    cores: float
    float8: bool = False
    average_every: int = 1


def seconds(work: Work, place: Place, run: Run) -> Seconds:
    """Predicts one optimizer step."""
    micro = work.step.at(run.micro_batch)
    for line in work.parts.values():
        micro = micro.plus(line.at(run.micro_batch))
    arithmetic, traffic, kernels = computing(micro, place, run)
    one = arithmetic + traffic + kernels
    backward = (work.step.each.total - work.forward) * run.micro_batch / max(micro.total, 1) * one
    communication, hidden = communicating(work, place, run, backward=backward)
    samples = run.micro_batch * run.accumulate
    return Seconds(
        arithmetic=run.accumulate * arithmetic,
        traffic=run.accumulate * traffic,
        kernels=run.accumulate * kernels,
        optimizer=optimizing(work, place, run),
        communication=communication,
        waiting=max(0.0, communication - hidden),
        data=samples / (run.cores * decode_rate(work)),
    )


def computing(amount: Amount, place: Place, run: Run) -> tuple[float, float, float]:
    """(Seconds of arithmetic, of memory traffic beside it, of kernels)."""
    rates = {
        kind: peak(kind, place.hardware, run) * place.hardware.achieved * run.stack.arithmetic
        for kind in (CONVOLUTION, LINEAR, ATTENTION)
    }
    arithmetic = sum(flops / rates[kind] for kind, flops in amount.flops.items())
    traffic = run.stack.traffic * amount.traffic / (place.hardware.bandwidth_tb * TERA * place.wires.memory)
    return arithmetic, traffic, run.stack.kernel_us * MICRO * amount.kernels


def peak(kind: str, hardware: Hardware, run: Run) -> float:
    """FLOP/s that the device is sold for; in float32, torch lets convolutions alone use TF32."""
    if run.precision.startswith("bf16"):
        figure = hardware.bf16
    elif run.precision.startswith("16"):
        figure = hardware.fp16
    else:
        figure = hardware.tf32 if kind == CONVOLUTION else hardware.fp32
    if run.float8 and kind == LINEAR and hardware.fp8 is not None:
        figure = hardware.fp8
    return figure * TERA


def optimizing(work: Work, place: Place, run: Run) -> float:
    """Seconds of the optimizer and of the moving average, which memory bounds."""
    size, settings = sum(work.trained), run.settings
    moved = STEP_BYTES * size + 2 * optimizer_bytes(work.trained, settings)
    spread = settings.gpus if run.strategy.name != "ddp" else 1
    rate = place.hardware.bandwidth_tb * TERA * place.wires.memory
    found = moved / spread / (PCIE if run.strategy.offload else rate)
    if not work.averaged:
        return found
    averaged = AVERAGE_BYTES * size / rate if not settings.ema_offload else FLOAT * size / PCIE
    alike = spread if run.strategy.name.startswith("fsdp") else 1
    return found + averaged / alike / run.average_every


def communicating(work: Work, place: Place, run: Run, *, backward: float) -> tuple[float, float]:
    """(Seconds of communication in a step, seconds of computing beside which it can go on), by ring formulas.

    A ring moves (n - 1) / n of the bytes to gather or to scatter, twice that to reduce for all.
    """
    n, size = place.gpus, sum(work.trained)
    if n == 1:
        return 0.0, 0.0
    once = (n - 1) / n * FLOAT * size / place.bandwidth + ceil(FLOAT * size / BUCKET) * place.latency
    overlap = place.wires.overlap
    if run.strategy.name == "ddp":
        return 2 * once, overlap * backward
    if run.strategy.name == "deepspeed":
        # Gradients in 16 bits: of stage 1 once a step, of stage 2 once a micro-batch; then parameters for all.
        share = HALF / FLOAT if run.settings.half else 1.0
        times = run.accumulate if run.strategy.stage == 2 else 1
        return share * once * (times + 1), overlap * backward * times
    # Parameters in the forward pass, again in the backward pass unless kept; gradients, each micro-batch.
    gathers = 1 if run.strategy.keeps_parameters else 2
    return run.accumulate * (gathers + 1) * once, run.accumulate * overlap * 1.5 * backward


def decode_rate(work: Work) -> float:
    """Samples a second that one core reads."""
    if work.reads.startswith("JPEG"):
        # Two bits a pixel, as the size was computed.
        return MEGAPIXELS_PER_SECOND * 1e6 / (work.jpeg_bytes * 4)
    return SAMPLES_PER_SECOND
