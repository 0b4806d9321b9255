"""Published training throughput beside what is predicted for it: where the model's constants come from, and its error.

Sources: README of mosaicml/diffusion (table "How many GPUs do I need?"); MLPerf Training 4.0, 4.1 and 5.0, stable
diffusion, from the logs of the results; NVIDIA's NeMo documentation, ControlNet; README of chuanyangjin/fast-DiT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Any

import torch
import yaml

from ldm.cli.compose import conf_folder
from ldm.cli.plan_count import Line
from ldm.cli.plan_hardware import Hardware
from ldm.cli.plan_memory import Settings, Strategy, memory
from ldm.cli.plan_parts import build_on_meta
from ldm.cli.plan_time import STACKS, WIRES, Place, Run, Stack, Wires, seconds
from ldm.cli.plan_work import Work, encode_line, largest_block, network_lines
from ldm.diffusion.conditioning import Conditioning

# Size of the error on rows that nothing was fitted on; a test holds them to `errors`.
MEDIAN_ERROR, WORST_ERROR = 0.08, 0.57

MOSAIC, MLPERF, NEMO, FAST_DIT = "MosaicML", "MLPerf", "NeMo", "fast-DiT"
# What each source trained with; none keeps a moving average in the rows below.
_FSDP = Strategy(name="fsdp", keeps_parameters=True)
_ZERO = Strategy(name="deepspeed", stage=2)
_ALONE = Strategy()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published figure.

    Args:
        network: of conf/network; `side` of what it sees.
        published: images a second for each device.
        fitted: whether the constants were fitted on it.
        extra: of the kinds of passes that are not the network's: "controlnet", "encoded" or nothing.
        gib: published memory of a device, where there is one.
    """

    source: str
    title: str
    network: str
    side: int
    hardware: str
    gpus: int
    micro_batch: int
    published: float
    accumulate: int = 1
    strategy: Strategy = _ALONE
    stack: str = "eager"
    checkpoint: bool = False
    fitted: bool = False
    extra: str = ""
    gib: float | None = None


def _mosaic(gpus: int, pixels: int, total: float, *, fitted: bool = False) -> Row:
    """Of a global batch of 2048, in micro-batches of 16."""
    return Row(
        source=MOSAIC, title=f"SD2 {pixels} px, latents and text precomputed", network="sd2", side=pixels // 8,
        hardware="a100_40", gpus=gpus, micro_batch=16, accumulate=2048 // gpus // 16, published=total / gpus,
        strategy=_FSDP, fitted=fitted,
    )  # fmt: skip


def _mlperf(
    version: str, hardware: str, gpus: int, batch: int, each: float, *, fitted: bool = False, gib: float | None = None
) -> Row:
    return Row(
        source=MLPERF, title=f"v{version}, SD2 512 px, latents and text precomputed", network="sd2", side=64,
        hardware=hardware, gpus=gpus, micro_batch=batch, published=each, strategy=_ZERO if gpus > 1 else _ALONE,
        stack="tuned", fitted=fitted, gib=gib,
    )  # fmt: skip


def _controlnet(batch: int, each: float, *, stack: str, gib: float) -> Row:
    return Row(
        source=NEMO, title="ControlNet 512 px, pictures and text encoded", network="sd1", side=64, hardware="a100_80",
        gpus=1, micro_batch=batch, published=each, stack=stack, extra="controlnet", gib=gib,
    )  # fmt: skip


ROWS = (
    _mosaic(8, 256, 1100),
    _mosaic(16, 256, 2180),
    _mosaic(32, 256, 4080),
    _mosaic(64, 256, 8530),
    _mosaic(128, 256, 11600),
    _mosaic(8, 512, 290, fitted=True),
    _mosaic(16, 512, 585),
    _mosaic(32, 512, 1195),
    _mosaic(64, 512, 2340),
    _mosaic(128, 512, 4590),
    _mlperf("4.1", "h100", 4, 64, 145.0),
    _mlperf("4.1", "h100", 8, 32, 137.4, fitted=True, gib=30.0),
    _mlperf("4.0", "h100", 64, 16, 110.3),
    _mlperf("4.1", "h100", 64, 16, 124.5),
    _mlperf("4.1", "h100", 512, 4, 76.8, fitted=True),
    _mlperf("4.1", "h100", 1024, 2, 48.7),
    _mlperf("4.0", "h200", 8, 64, 128.5),
    _mlperf("4.1", "h200", 8, 32, 145.0),
    _mlperf("5.0", "h200", 8, 64, 149.6),
    _mlperf("5.0", "b200", 8, 32, 274.0),
    _controlnet(8, 16.40, stack="eager", gib=33),
    _controlnet(8, 21.52, stack="compiled", gib=29),
    _controlnet(32, 27.20, stack="compiled", gib=66),
    Row(
        source=FAST_DIT, title="DiT-XL/2 256 px, latents precomputed, recomputed blocks", network="dit_xl_2", side=32,
        hardware="a100_80", gpus=1, micro_batch=128, published=107.5, checkpoint=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """A row and what is predicted for it."""

    row: Row
    predicted: float
    gib: float

    @property
    def error(self) -> float:
        """Predicted over published, less one."""
        return self.predicted / self.row.published - 1


def compare(stacks: Mapping[str, Stack] = STACKS, wires: Wires = WIRES) -> list[Compared]:
    """Every published row beside its prediction."""
    return [_compared(row, stacks[row.stack], wires) for row in ROWS]


def errors(found: list[Compared]) -> tuple[float, float]:
    """(Median, largest) size of the error of the rows that nothing was fitted on."""
    held_out = [abs(one.error) for one in found if not one.row.fitted]
    return median(held_out), max(held_out)


def encoding_ratio(pixels: int) -> float:
    """Time of a step that encodes pictures and captions over one with both precomputed; MosaicML says 1.4."""
    row = _mosaic(8, pixels, 1.0)
    return (
        _compared(row, STACKS["eager"], WIRES).predicted
        / _compared(replace(row, extra="encoded"), STACKS["eager"], WIRES).predicted
    )


def hardware(name: str) -> Hardware:
    """A row of the table of GPUs, as it is shipped."""
    settings = yaml.safe_load((conf_folder() / "hardware" / f"{name}.yaml").read_text())
    return Hardware(**{key: value for key, value in settings.items() if key != "_target_"})


def _compared(row: Row, stack: Stack, wires: Wires) -> Compared:
    work = network_work(row.network, row.side, checkpoint=row.checkpoint, extra=row.extra)
    settings = Settings(optimizer="AdamW", momentum=False, ema_offload=False, half=True, gpus=row.gpus)
    run = Run(
        precision="16-mixed",
        micro_batch=row.micro_batch,
        accumulate=row.accumulate,
        settings=settings,
        strategy=row.strategy,
        stack=stack,
        cores=8,
    )
    taken = seconds(work, Place(hardware=hardware(row.hardware), gpus=row.gpus, wires=wires), run)
    held = memory(work, settings, row.strategy, micro_batch=row.micro_batch).total
    return Compared(row, row.micro_batch * row.accumulate / taken.step, held / 2**30)


@cache
def network_work(name: str, side: int, *, checkpoint: bool = False, extra: str = "") -> Work:
    """The work of a network of conf/network in 16 bits, as published runs had it: without a moving average."""
    network, node = _network(name), _node(name)
    network.checkpoint_blocks = checkpoint

    def told(size: int) -> Conditioning:
        with torch.device("meta"):
            context = torch.empty(size, 77, node["context_dim"]) if node.get("context_dim") else None
            vector = torch.empty(size, dtype=torch.int64) if node.get("num_classes") else None
        return Conditioning(context=context, vector=vector)

    shape = (node["in_channels"], side, side)
    step, plain, forward = network_lines(network, shape, lambda size: [told(size)], torch.float16)
    trained = [p.numel() for p in network.parameters()]
    others, frozen = _encoders(8 * side) if extra else ({}, 0)
    if extra == "controlnet":
        half = _encoder_share(network, side, node["context_dim"], forward)
        # The network goes forward, and backward through its decoder for inputs alone; its copied encoder as always.
        factor = (forward + 3 * half + (forward - half)) / plain
        step, plain = Line(step.fixed, replace(step.each.times(factor), peak=step.each.peak)), factor * plain
        frozen += sum(trained)
        trained = [p.numel() for part in (network.input_blocks, network.middle_block) for p in part.parameters()]
    return Work(
        step=step,
        plain=plain,
        forward=forward,
        parts=others,
        trained=trained,
        frozen=frozen,
        averaged=False,
        largest_block=largest_block(network),
        counts={"network": sum(trained)},
        sample_bytes=0.0,
        reads="moments",
    )


def _node(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((conf_folder() / "network" / f"{name}.yaml").read_text()))


def _network(name: str) -> Any:
    return build_on_meta(_node(name))


def _encoders(pixels: int) -> tuple[dict[str, Line], int]:
    """The first stage of Stable Diffusion on pictures; its text encoder is some hundredths of it, and left out."""
    node = yaml.safe_load((conf_folder() / "autoencoder" / "sd.yaml").read_text())
    first_stage = build_on_meta(node).requires_grad_(False)
    object.__setattr__(first_stage, "check_images", lambda images: None)
    count = sum(p.numel() for p in first_stage.parameters())
    return {"first stage": encode_line(first_stage, pixels, torch.float16)}, count


def _encoder_share(network: Any, side: int, width: int, forward: float) -> float:
    """FLOPs a sample of the U-Net's way down and middle."""
    from ldm.cli.plan_count import forward_amount

    def down() -> Any:
        with torch.device("meta"):
            h, emb = torch.empty(1, 4, side, side), torch.empty(1, 4 * network.model_channels)
            context = torch.empty(1, 77, width)
        for block in [*network.input_blocks, network.middle_block]:
            h = block(h, emb, context, None)
        return h

    return min(forward, forward_amount(down, dtype=torch.float16).total)
