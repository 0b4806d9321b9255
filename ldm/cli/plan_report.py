"""What `ldm plan` prints and writes."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from ldm.cli.console import heading, say
from ldm.cli.plan import Plan
from ldm.cli.plan_hardware import Hardware
from ldm.cli.plan_memory import FULL, Strategy, fitting_batch, host_bytes, memory
from ldm.cli.plan_published import MEDIAN_ERROR, WORST_ERROR, Compared, compare, encoding_ratio, errors
from ldm.cli.plan_time import decode_rate

GIB, TERA, MEGA = 2**30, 1e12, 1e6
OTHERS = (Strategy(), Strategy(name="fsdp"), Strategy(name="fsdp2"), *(
    Strategy(name="deepspeed", stage=stage) for stage in (1, 2)
))  # fmt: skip


def show_plan(plan: Plan) -> None:
    """Prints all of it."""
    place, run = plan.place, plan.run
    wires = place.interconnect.title if place.interconnect else f"{place.hardware.network_gb:g} GB/s a GPU"
    where = f"{place.gpus} x {place.hardware.title}" + (f", {place.nodes} nodes, {wires}" if place.nodes > 1 else "")
    heading(f"{plan.title}, {run.precision}, {run.strategy.title} on {where}")
    _rows("batch", _batch_rows(plan))
    _rows("arithmetic, TFLOP an image", [(name, f"{flops / TERA:.4g}") for name, flops in plan.work.flops.items()])
    _rows("parameters, millions", [(name, f"{count / MEGA:,.2f}") for name, count in plan.work.counts.items()])
    _show_memory_parts(plan)
    _rows(f"memory by strategy, micro-batch {run.micro_batch}, GiB", _strategy_rows(plan))
    _rows("one optimizer step, ms", _time_rows(plan))
    _rows("data", _data_rows(plan))
    _rows("the whole run", _run_rows(plan))
    _say_notes(plan)


def show_memory(plan: Plan, all_hardware: Sequence[Hardware]) -> None:
    """Prints the memory of a run as it is set, and on which devices it fits."""
    run = plan.run
    heading(f"{plan.title}, {run.precision}, {run.strategy.title}: memory of each of {plan.place.gpus} device(s)")
    _rows("batch", _batch_rows(plan))
    _show_memory_parts(plan)
    rows = []
    for hardware in all_hardware:
        fits = plan.memory.total <= FULL * hardware.memory
        most = _most(plan, hardware)
        word = "fits" if fits else "does not fit"
        rows.append((hardware.title, f"{word}; up to {most} at once" if most else f"{word}, nor does one image"))
    _rows("on", rows)
    _say_remedies(plan, fits=False)


def show_published() -> None:
    """Prints published throughput beside predictions."""
    found = compare()
    for line in _published_lines(found):
        say(line)
    middle, worst = errors(found)
    say(f"held out: median error {middle:.0%}, largest {worst:.0%}; fitted rows are marked *")
    ratios = ", ".join(f"{pixels} px {encoding_ratio(pixels):.2f}" for pixels in (256, 512))
    say(f"time with pictures and text encoded over precomputed: published 1.4 (MosaicML); predicted {ratios}")
    say("no GPU was at hand: nothing here was measured on one")


def as_json(plan: Plan) -> dict[str, Any]:
    """All figures, in bytes, seconds, FLOPs and images."""
    return {
        "gpus": plan.place.gpus,
        "hardware": plan.place.hardware.title,
        "strategy": plan.run.strategy.title,
        "batch": {
            "global": plan.batch,
            "micro": plan.run.micro_batch,
            "accumulate": plan.run.accumulate,
            "settings": _settings(plan),
        },
        "flops_per_image": plan.work.flops,
        "parameters": plan.work.counts,
        "memory": {**vars(plan.memory), "total": plan.memory.total, "fits": _fits(plan)},
        "seconds": {**vars(plan.seconds), "step": plan.seconds.step},
        "images_per_second": plan.images_per_second,
        "bytes_per_second": plan.images_per_second * plan.work.sample_bytes,
        "hours": plan.hours,
        "gpu_hours": None if plan.hours is None else plan.hours * plan.place.gpus,
        "bottleneck": plan.seconds.bottleneck,
        "published_error": {"median": MEDIAN_ERROR, "largest": WORST_ERROR},
        "notes": plan.work.notes,
    }


def markdown(found: Sequence[Compared]) -> str:
    """The table of published rows for a recorded result."""
    lines = [
        "| source | run | GPUs | micro-batch | published | predicted | error | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        row = one.row
        lines.append(
            f"| {row.source} | {row.title} | {row.gpus} x {row.hardware} | {row.micro_batch} | {row.published:.1f} | "
            f"{one.predicted:.1f} | {one.error:+.0%} | {'fitted' if row.fitted else 'held out'} |"
        )
    return "\n".join(lines)


def _rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    say(title, style="bold")
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        say(f"  {name:<{width}}  {text}")


def _settings(plan: Plan) -> str:
    """What to type to have the planned batch."""
    per_node = min(plan.place.gpus, plan.place.hardware.gpus_per_node)
    step = plan.place.gpus * plan.run.micro_batch
    return (
        f"trainer.devices={per_node} trainer.num_nodes={plan.place.nodes} data.batch_size={step} "
        f"trainer.accumulate_grad_batches={plan.run.accumulate}"
    )


def _batch_rows(plan: Plan) -> list[tuple[str, str]]:
    product = f"{plan.place.gpus} GPUs x {plan.run.micro_batch} at once x {plan.run.accumulate} accumulated"
    return [("global", f"{plan.batch} = {product}"), ("set", _settings(plan))]


def _fits(plan: Plan) -> bool:
    return plan.memory.total <= FULL * plan.place.hardware.memory


def _show_memory_parts(plan: Plan) -> None:
    rows = [(name, f"{size / GIB:.2f}") for name, size in plan.memory.rows()]
    rows.append(("in all", f"{plan.memory.total / GIB:.2f} of {plan.place.hardware.memory_gib:g}"))
    if host := host_bytes(plan.work, plan.run.settings, plan.run.strategy):
        rows.append(("on the CPU's side", f"{host / GIB:.2f} for each device"))
    _rows("memory of one device, GiB (activations of operators one by one: compiled code keeps fewer)", rows)
    if not _fits(plan):
        _say_remedies(plan, fits=False, always=True)


def _say_remedies(plan: Plan, *, fits: bool, always: bool = False) -> None:
    if always and not fits:
        say(f"does not fit into {FULL:.0%} of {plan.place.hardware.title}", style="bold red")
    if not always and plan.remedies:
        say(f"less memory: {'; '.join(plan.remedies)}")


def _most(plan: Plan, hardware: Hardware) -> int:
    """The largest micro-batch that fits and divides a device's share; 0 where one image does not."""
    run = plan.run
    share = run.micro_batch * run.accumulate
    size = fitting_batch(plan.work, run.settings, run.strategy, per_device=share, room=hardware.memory)
    taken = memory(plan.work, run.settings, run.strategy, micro_batch=size)
    return size if taken.total <= FULL * hardware.memory else 0


def _strategy_rows(plan: Plan) -> list[tuple[str, str]]:
    rows = []
    for strategy in OTHERS:
        taken = memory(plan.work, plan.run.settings, strategy, micro_batch=plan.run.micro_batch)
        rows.append((strategy.title, f"{taken.total / GIB:.2f}"))
    return rows


def _time_rows(plan: Plan) -> list[tuple[str, str]]:
    found = plan.seconds
    rows = {
        "arithmetic": found.arithmetic,
        "memory traffic": found.traffic,
        "small kernels": found.kernels,
        "optimizer and average": found.optimizer,
        "communication": found.communication,
        "of it not hidden": found.waiting,
        "reading data, beside it": found.data,
        "step": found.step,
    }
    return [(name, f"{1e3 * value:,.1f}") for name, value in rows.items()] + [("bottleneck", found.bottleneck)]


def _data_rows(plan: Plan) -> list[tuple[str, str]]:
    rate = plan.images_per_second / plan.place.nodes
    one = decode_rate(plan.work)
    cores = ceil(rate / one)
    have = min(plan.place.gpus, plan.place.hardware.gpus_per_node) * plan.run.cores
    return [
        ("a sample", f"{plan.work.sample_bytes / 1e3:,.1f} kB of {plan.work.reads}"),
        ("read by each node", f"{rate * plan.work.sample_bytes / MEGA:,.1f} MB/s, {rate:,.1f} images/s"),
        ("one core reads", f"{one:,.0f} images/s"),
        (
            "cores",
            f"{cores} needed, {have:g} at work (data.num_workers), {plan.place.hardware.cores_per_node} in a node",
        ),
    ]


def _run_rows(plan: Plan) -> list[tuple[str, str]]:
    each = plan.images_per_second / plan.place.gpus
    rows = [("images/s", f"{plan.images_per_second:,.1f}, {each:,.2f} a GPU")]
    if plan.hours is not None:
        taken = f"{plan.hours / 24:,.2f} days" if plan.hours >= 24 else f"{plan.hours:,.2f} hours"
        together = plan.hours * plan.place.gpus
        rows.append((f"{plan.max_steps:,} steps", f"{taken}, {together:,.{0 if together >= 100 else 2}f} GPU-hours"))
    return rows


def _say_notes(plan: Plan) -> None:
    for note in plan.work.notes:
        say(f"note: {note}", style="dim")
    if not _fits(plan):
        _say_remedies(plan, fits=False)
    say(
        f"beside published throughput this model errs by {MEDIAN_ERROR:.0%} in the median and {WORST_ERROR:.0%} at "
        "most, on rows that it was not fitted to (ldm plan check=true); nothing was measured on a GPU",
        style="dim",
    )


def _published_lines(found: Sequence[Compared]) -> list[str]:
    names = ("published", "predicted", "error", "GiB", "predicted")
    lines = [f"{'images/s for each GPU':<92}" + "".join(f"{name:>11}" for name in names)]
    for one in found:
        row = one.row
        run = f"{row.source}, {row.title}, {row.gpus} x {row.hardware}, micro-batch {row.micro_batch}"
        error = f"{one.error:+.0%}{'*' if row.fitted else ' '}"
        cells = (
            f"{row.published:.1f}",
            f"{one.predicted:.1f}",
            error,
            f"{row.gib:g}" if row.gib else "",
            f"{one.gib:.1f}",
        )
        lines.append(f"{run:<92}" + "".join(f"{cell:>11}" for cell in cells))
    return lines
