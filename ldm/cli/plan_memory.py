"""Memory of one device in training: what is held all the time, and what a batch adds, by strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.cli.plan_work import Work

STRATEGIES = ("ddp", "fsdp", "fsdp2", "deepspeed")
FLOAT, HALF = 4, 2
# The driver's context and the libraries' workspaces: assumed.
CONTEXT = 1.5 * 2**30
# What the allocator wastes of activations: assumed.
FRAGMENTED = 0.05
# Of the device's memory, what a plan may fill.
FULL = 0.95
# bitsandbytes: smaller tensors keep 32 bits, a block of values shares a float32.
SMALLEST_8BIT, BLOCK_8BIT = 4096, 256


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How parameters, gradients and optimizer state are spread over processes.

    Args:
        name: ddp, fsdp, fsdp2 or deepspeed.
        stage: of deepspeed.
        whole_gradients: of fsdp: gather parameters once a step (SHARD_GRAD_OP).
        offload: keep the optimizer's state in the CPU's memory.
    """

    name: str = "ddp"
    stage: int = 0
    keeps_parameters: bool = False
    offload: bool = False

    @staticmethod
    def of(config: DictConfig) -> Strategy:
        """What an experiment sets; `auto` is ddp, as Lightning has it for several devices."""
        node = OmegaConf.select(config, "strategy")
        if not OmegaConf.is_config(node):
            return Strategy(name=str(node) if str(node) in STRATEGIES else "ddp")
        name = str(node.get("_target_", "")).rpartition(".")[2]
        if name == "deepspeed":
            return Strategy(name=name, stage=node.stage, offload=bool(node.offload_optimizer))
        if name == "fsdp":
            return Strategy(name=name, keeps_parameters=node.sharding_strategy == "SHARD_GRAD_OP")
        return Strategy(name=name if name in STRATEGIES else "ddp")

    @property
    def title(self) -> str:
        """For people."""
        if self.name == "deepspeed":
            return f"deepspeed, stage {self.stage}" + (", offloaded" if self.offload else "")
        return f"{self.name} (gradients and optimizer spread)" if self.keeps_parameters else self.name


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides about memory besides the model.

    Args:
        optimizer: the class's name.
        momentum: of SGD.
        ema_offload: the moving average is in the CPU's memory.
        half: products are in 16 bits.
        gpus: processes.
    """

    optimizer: str
    momentum: bool
    ema_offload: bool
    half: bool
    gpus: int

    @staticmethod
    def of(config: DictConfig, *, gpus: int) -> Settings:
        """What an experiment sets."""
        node = OmegaConf.select(config, "model.optimizer") or {}
        return Settings(
            optimizer=str(node.get("_target_", "")).rpartition(".")[2],
            momentum=bool(node.get("momentum", 0)),
            ema_offload=bool(OmegaConf.select(config, "model.ema_offload")),
            half=str(config.trainer.precision) not in ("32", "32-true"),
            gpus=gpus,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, by what they are for; `activations` is the most that a micro-batch has alive."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    gathered: float
    activations: float
    context: float = CONTEXT

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())

    def rows(self) -> list[tuple[str, float]]:
        """(Name, bytes), those that are there."""
        return [(name, size) for name, size in vars(self).items() if size]


def optimizer_bytes(trained: Sequence[int], settings: Settings) -> float:
    """The optimizer's state: two moments in float32, or in 8 bits, or what else the class keeps."""
    name = settings.optimizer
    if name.endswith("8bit"):
        # Blocks are counted up, and each of both moments has its own.
        return sum(8 * n if n < SMALLEST_8BIT else 2 * (n + FLOAT * -(-n // BLOCK_8BIT)) for n in trained)
    if name == "SGD":
        return FLOAT * sum(trained) if settings.momentum else 0
    return (FLOAT if name in ("Lion", "RMSprop", "Adagrad") else 2 * FLOAT) * sum(trained)


def memory(work: Work, settings: Settings, strategy: Strategy, *, micro_batch: int) -> Memory:
    """Memory of one device for micro-batches of this size.

    Gradients are counted beside all activations although the first come as the last go: a little too much.
    """
    size, n = sum(work.trained), settings.gpus
    state = optimizer_bytes(work.trained, settings)
    average = 0.0 if settings.ema_offload or not work.averaged else FLOAT * size
    frozen = FLOAT * work.frozen
    active = _active(work, micro_batch)
    if strategy.name == "deepspeed":
        return _deepspeed(size, frozen, state, average, active, settings, strategy)
    if strategy.name == "ddp":
        return Memory(frozen + FLOAT * size, FLOAT * size, state, average, 0.0, active)
    # fsdp wraps the network whole, fsdp2 block by block: two blocks are whole at a time, with one's gradients.
    whole = size if strategy.name == "fsdp" else min(size, 2 * work.largest_block)
    gathered = 0.0 if n == 1 else 1.5 * FLOAT * whole if strategy.name == "fsdp2" else 2.0 * FLOAT * whole
    return Memory(frozen + FLOAT * size / n, FLOAT * size / n, state / n, average / n, gathered, active)


def _deepspeed(
    size: float, frozen: float, state: float, average: float, active: float, settings: Settings, strategy: Strategy
) -> Memory:
    """In 16 bits every weight and gradient is so, and the optimizer has the true weights in float32."""
    width = HALF if settings.half else FLOAT
    own = state + (FLOAT * size if settings.half else 0)
    shared = 0.0 if strategy.offload else own / settings.gpus
    gradients = width * size / (settings.gpus if strategy.stage == 2 else 1)
    scale = width / FLOAT
    return Memory(scale * (frozen + FLOAT * size), gradients, shared, scale * average, 0.0, active)


def _active(work: Work, micro_batch: int) -> float:
    """The most bytes alive in a micro-step: of the passes, or before them of a part that makes their inputs."""
    passes = [work.step, *work.parts.values()]
    return (1 + FRAGMENTED) * max(line.at(micro_batch).peak for line in passes)


def host_bytes(work: Work, settings: Settings, strategy: Strategy) -> float:
    """What offloading takes of the CPU's memory for one device."""
    size = sum(work.trained)
    average = FLOAT * (size + work.frozen) if settings.ema_offload and work.averaged else 0
    state = optimizer_bytes(work.trained, settings) + (FLOAT * size if settings.half else 0)
    return average + (state / settings.gpus if strategy.offload else 0)


def divisors(number: int) -> list[int]:
    """The divisors of a number, largest first."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)}, reverse=True)


def fitting_batch(work: Work, settings: Settings, strategy: Strategy, *, per_device: int, room: float) -> int:
    """The largest micro-batch that divides a device's share and fits into `room` bytes; 1 where none does."""

    def fits(size: int) -> bool:
        return memory(work, settings, strategy, micro_batch=size).total <= FULL * room

    return next((size for size in divisors(per_device) if fits(size)), 1)


def remedies(config: Any, work: Work, settings: Settings, strategy: Strategy) -> list[str]:
    """Settings that take less memory, those that are not set yet."""
    found = []
    if "network" in work.counts and not OmegaConf.select(config, "network.checkpoint_blocks"):
        found.append("+network.checkpoint_blocks=true")
    if not settings.half:
        found.append("trainer.precision=bf16-mixed")
    if not settings.optimizer.endswith("8bit"):
        found.append("optimizer=adamw_8bit")
    if strategy.name == "ddp" and settings.gpus > 1:
        found.append("strategy=fsdp2")
    if work.averaged and not settings.ema_offload and strategy.name != "fsdp2":
        found.append("model.ema_offload=true")
    if "first stage" in work.parts:
        found.append("latents=precomputed, after ldm data encode")
    return found
