"""`ldm plan`: what an experiment takes on other machines, without a step of it: memory, seconds, data, GPU-hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ldm.cli.build import build
from ldm.cli.chain import check_counts
from ldm.cli.errors import UserError, did_you_mean
from ldm.cli.memory import takes_pieces
from ldm.cli.run_folder import write_json

if TYPE_CHECKING:
    from ldm.cli.plan_hardware import Hardware
    from ldm.cli.plan_memory import Memory, Settings, Strategy
    from ldm.cli.plan_time import Place, Run, Seconds
    from ldm.cli.plan_work import Work

CHOICES = {"show": ("all", "memory"), "stack": ("auto", "eager", "compiled", "tuned")}
# How memory alone is asked for, and of which commands.
MEMORY = ("+memory", "+memory=true", "+memory=estimate")
OF_MEMORY = ("train", "reproduce", "plan")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A planned run and what is predicted for it."""

    title: str
    work: Work
    place: Place
    run: Run
    memory: Memory
    seconds: Seconds
    max_steps: int
    remedies: list[str]

    @property
    def batch(self) -> int:
        """Samples of an optimizer step."""
        return self.place.gpus * self.run.micro_batch * self.run.accumulate

    @property
    def images_per_second(self) -> float:
        """Of all devices."""
        return self.batch / self.seconds.step

    @property
    def hours(self) -> float | None:
        """Of the whole run; None where it has no end."""
        return self.max_steps * self.seconds.step / 3600 if self.max_steps > 0 else None


def asks_for_memory(command: str, arguments: Sequence[str]) -> bool:
    """Whether `ldm train ... +memory` or the like was typed, which `ldm plan` answers."""
    return command in OF_MEMORY and any(argument in MEMORY for argument in arguments)


def as_plan(arguments: Sequence[str]) -> list[str]:
    """The arguments of the `ldm plan` that answers it."""
    kept = [argument for argument in arguments if argument not in MEMORY and not argument.startswith("reproduce.")]
    return [*kept, "show=memory"]


def plan(config: DictConfig, overrides: Sequence[str]) -> None:
    """Predicts, and prints what was predicted.

    Raises:
        UserError: a setting is wrong.
    """
    for key, choices in CHOICES.items():
        if config[key] not in choices:
            hint = did_you_mean(str(config[key]), list(choices))
            raise UserError(f"{key}: got {config[key]}, expected one of {', '.join(choices)}{hint}")
    from ldm.cli import plan_report

    if config.check:
        plan_report.show_published()
        return
    found = predict(config)
    if config.show == "memory":
        plan_report.show_memory(found, _all_hardware())
    else:
        plan_report.show_plan(found)
    if config.out is not None:
        write_json(Path(str(config.out)), plan_report.as_json(found))


def predict(config: DictConfig) -> Plan:
    """What a composed config of `ldm plan` takes.

    Raises:
        UserError: a setting is wrong, or the batch does not divide.
    """
    # Torch takes a second to import.
    from ldm.cli.plan_memory import Settings, Strategy, memory, remedies
    from ldm.cli.plan_time import STACKS, Place, Run, seconds
    from ldm.cli.plan_work import count_work

    check_counts(config)
    gpus = num_gpus(config)
    place = Place(hardware=build(config.hardware), gpus=gpus, interconnect=_interconnect(config))
    per_device = share_of_batch(config, gpus)
    work = count_work(config)
    settings, strategy = Settings.of(config, gpus=gpus), Strategy.of(config)
    micro = _micro_batch(config, work, settings, strategy, per_device=per_device, room=place.hardware.memory)
    is_compiled = OmegaConf.select(config, "model.compile") is not None
    stack = ("compiled" if is_compiled else "eager") if config.stack == "auto" else config.stack
    run = Run(
        precision=str(config.trainer.precision),
        micro_batch=micro,
        accumulate=per_device // micro,
        settings=settings,
        strategy=strategy,
        stack=STACKS[stack],
        cores=max(1, OmegaConf.select(config, "data.num_workers") or 0),
        float8=OmegaConf.select(config, "model.float8") == "device",
        average_every=OmegaConf.select(config, "model.ema_every_n_steps") or 1,
    )
    return Plan(
        title=f"{config.name}: {stack}",
        work=work,
        place=place,
        run=run,
        memory=memory(work, settings, strategy, micro_batch=micro),
        seconds=seconds(work, place, run),
        max_steps=config.trainer.max_steps,
        remedies=remedies(config, work, settings, strategy),
    )


def num_gpus(config: DictConfig) -> int:
    """Devices in all: as asked for, or the trainer's.

    Raises:
        UserError: no whole number.
    """
    asked = config.gpus
    if asked is None:
        devices = str(config.trainer.devices)
        count = (
            len([part for part in devices.split(",") if part])
            if "," in devices
            else int(devices or 1)
            if (devices.isdecimal())
            else 1
        )
        return count * int(config.trainer.num_nodes)
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
        raise UserError(f"gpus: got {asked}, expected a whole number from 1 on")
    return asked


def share_of_batch(config: DictConfig, gpus: int) -> int:
    """Samples of one device in an optimizer step: the global batch is what is given.

    Raises:
        UserError: it does not divide.
    """
    size, accumulated = OmegaConf.select(config, "data.batch_size"), config.trainer.accumulate_grad_batches or 1
    if not isinstance(size, int) or size < 1:
        raise UserError(f"data.batch_size: got {size}, expected a whole number from 1 on; choose data=... with one")
    batch = size * accumulated
    if batch % gpus:
        from ldm.cli.plan_memory import divisors

        near = sorted(divisors(batch), key=lambda number: abs(number - gpus))[:3]
        rounded = max(1, round(batch / gpus)) * gpus
        raise UserError(
            f"gpus: got {gpus}, expected a divisor of the global batch {batch} (data.batch_size={size} x "
            f"trainer.accumulate_grad_batches={accumulated}); set gpus to {', '.join(map(str, near))}, or "
            f"data.batch_size={rounded} trainer.accumulate_grad_batches=1"
        )
    return batch // gpus


def _micro_batch(
    config: DictConfig, work: Work, settings: Settings, strategy: Strategy, *, per_device: int, room: float
) -> int:
    """As asked for; an autoencoder's whole share; for `show=memory` as the run is set; else the most that fit."""
    from ldm.cli.plan_memory import fitting_batch

    asked = config.micro_batch
    if asked is not None:
        if not isinstance(asked, int) or asked < 1 or per_device % asked:
            raise UserError(f"micro_batch: got {asked}, expected a divisor of {per_device}, one device's share")
        return asked
    if not takes_pieces(config):
        return per_device
    if config.show == "memory":
        return per_device // int(config.trainer.accumulate_grad_batches or 1) or 1
    return fitting_batch(work, settings, strategy, per_device=per_device, room=room)


def _interconnect(config: DictConfig) -> Any:
    return build(config.interconnect) if OmegaConf.select(config, "interconnect") is not None else None


def _all_hardware() -> list[Hardware]:
    from ldm.cli.compose import conf_folder
    from ldm.cli.plan_published import hardware

    return [hardware(file.stem) for file in sorted((conf_folder() / "hardware").glob("*.yaml"))]
