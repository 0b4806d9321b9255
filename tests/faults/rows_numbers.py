"""Rows 27, 28, 32 and 35: losses that are no numbers or stand out, memory that runs out, errors in validation."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from tests.faults.bench_child import Setting, checkpoints, difference, difference_of
from tests.faults.bench_row import Result, row
from tests.faults.rows_runs import TINY

GUARD = "callback=[checkpoint,preemption,watchdog,spike_guard]"


def spoil(steps: list[int], factor: float, **options: Any) -> list[str]:
    """Overrides that spoil some steps."""
    settings = {"steps": str(steps).replace(" ", ""), "factor": factor, **options}
    return [
        "+callback.spoil._target_=faulty.Spoil",
        *(f"+callback.spoil.{key}={value}" for key, value in settings.items()),
    ]


def skipped(run: Path) -> list[dict[str, Any]]:
    path = run / "skipped.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(line["train/loss"]) for line in csv.DictReader(file) if line.get("train/loss")]


def ended_finite(run: Path, rank: int = 0) -> bool:
    import torch

    state = torch.load(run / "seen" / f"end-rank={rank}.pt", weights_only=True)
    return all(bool(value.isfinite().all()) for value in state.values())


@row(
    27,
    "a loss that is NaN or infinite, a gradient alone, on one rank alone, for ever",
    must_hold="left out and recorded; weights finite; ranks agree bit for bit; for ever: exit 3",
    stock="trains to the end, returns NaN weights with exit 0",
)
def not_finite(setting: Setting) -> Result:
    cases: dict[str, list[str]] = {
        "nan": spoil([5], "nan"),
        "inf": spoil([5, 6], "inf"),
        "gradient": spoil([7], "nan", gradient=True),
    }
    held, left_out = True, {}
    for name, words in cases.items():
        outcome, run = setting.train(GUARD, f"run_id={name}", *words), setting.run_of(name)
        left_out[name] = [line["step"] for line in skipped(run)]
        held &= outcome.code == 0 and ended_finite(run)
    held &= left_out == {"nan": [5], "inf": [5, 6], "gradient": [7]}
    ever = setting.train(GUARD, "run_id=ever", *spoil(list(range(6, 20)), "nan"), "callback.spike_guard.patience=4")
    held &= ever.code == 3 and len(ever.errors) == 1 and checkpoints(setting.run_of("ever"))[-1] >= 4
    apart = float("nan")
    if not setting.quick:
        outcome = setting.ranks(GUARD, "run_id=rank", *spoil([5], "nan", rank=1))
        ends = [setting.run_of("rank") / "seen" / f"end-rank={rank}.pt" for rank in (0, 1)]
        apart = difference_of(*ends)
        held &= outcome.code == 0 and apart == 0 and ended_finite(setting.run_of("rank"))
        held &= [line["step"] for line in skipped(setting.run_of("rank"))] == [5]
    figure = f"left out {left_out}, all finite; for ever: exit {ever.code}; ranks apart by {apart:g}"
    return Result(held, figure, {"said": ever.errors})


@row(
    28,
    "batches whose loss is 50 times too large",
    must_hold="a single one is left out; a run of them rolled back and jumped over; final loss within 1 % of clean; "
    "no false alarm",
    stock="no action",
)
def spikes(setting: Setting) -> Result:
    steps = setting.trials(300, 160)
    common = [GUARD, f"trainer.max_steps={steps}", "callback.checkpoint.every_n_steps=20", "+model.learning_rate=3e-4"]
    common += [
        "callback.spike_guard.num_warmup=50",
        "callback.spike_guard.window=100",
        "callback.spike_guard.read_every=5",
    ]
    clean = setting.train("run_id=clean", *common)
    alarms = len(skipped(setting.run_of("clean")))
    first = [80, 110]
    one = setting.train("run_id=one", *common, *spoil(first, 50.0))
    run_of_them = [90, 91, 92]
    many = setting.train("run_id=many", *common, *spoil(run_of_them, 50.0), "callback.spike_guard.policy=rollback")
    ends = {name: sum(losses(setting.run_of(name))[-40:]) / 40 for name in ("clean", "one", "many")}
    apart = {name: abs(ends[name] / ends["clean"] - 1) for name in ("one", "many")}
    record = skipped(setting.run_of("many"))
    back = [line for line in record if line.get("event") == "rollback"]
    left_out = [line["step"] for line in skipped(setting.run_of("one"))]
    held = clean.code == one.code == many.code == 0 and alarms == 0 and left_out == first and len(back) == 1
    held &= max(apart.values()) < 0.01
    lost = back[0]["at"] + 1 - back[0]["to"] if back else None
    figure = (
        f"final loss apart by {100 * apart['one']:.2f} % (left out), {100 * apart['many']:.2f} % (rolled back, {lost} "
        f"steps again); {alarms} false alarms in {steps} steps"
    )
    return Result(held, figure, {"losses": ends, "record": record, "left_out": left_out})


@row(
    32,
    "memory runs out: an allocation fails, CUDA says so",
    must_hold="one line that says what to set, with this run's numbers; with on_out_of_memory=halve the run goes on in "
    "smaller pieces with the same samples in every step",
    stock="a traceback",
)
def out_of_memory(setting: Setting) -> Result:
    clean, said, sgd = setting.clean("clean-sgd", "+model.optimizer=sgd"), {}, "+model.optimizer=sgd"
    held = True
    for kind in ("memory", "allocation"):
        outcome = setting.train(f"run_id={kind}", f"callback.fault.kind={kind}", "callback.fault.at=6")
        said[kind] = outcome.errors
        held &= outcome.code == 1 and len(outcome.errors) == 1
        held &= "data.batch_size=3 trainer.accumulate_grad_batches=2" in "".join(outcome.errors)
    once = setting.folder / "once"
    words = (sgd, "callback.fault.kind=memory", "callback.fault.at=6", f"callback.fault.once={once}")
    words += ("on_out_of_memory=halve",)
    halved, run = setting.train("run_id=halved", *words), setting.run_of("halved")
    apart = difference(run, clean) if halved.code == 0 else float("inf")
    pieces, whole = pieces_of(run), pieces_of(clean)
    same = pieces == whole
    held &= halved.code == 0 and same and apart < TINY
    figure = f"hint with numbers; halved: exit {halved.code}, samples of every step {'equal' if same else 'DIFFER'}"
    return Result(held, f"{figure}, largest difference {apart:.1e}", {"said": said, "halved": halved.text[-1200:]})


def pieces_of(run: Path) -> dict[int, list[Any]]:
    """Each step's samples, of all of its pieces; of a step that was done again, what came last."""
    import ast

    steps: dict[int, list[Any]] = {}
    previous = -1
    path = run / "seen" / "rank=0.txt"
    if not path.exists():
        return {}
    for line in path.read_text().splitlines():
        step, samples = line.split(" ", 1)
        if int(step) != previous or _positions(steps.get(int(step), [])) & _positions(ast.literal_eval(samples)):
            steps[int(step)] = []
        previous = int(step)
        steps[int(step)] += ast.literal_eval(samples)
    return steps


def _positions(samples: list[Any]) -> set[int]:
    return {position for position, _ in samples}


@row(
    35,
    "an error in validation, with a moving average",
    must_hold="weights and average stay in their places; goes on bit for bit; what is exported is the average",
    stock="raw and averaged weights in each other's places; save_weights_only exports the raw ones",
)
def error_in_validation(setting: Setting) -> Result:
    validated = [f"data.validation={setting.colours}", "trainer.limit_val_batches=1", "trainer.val_check_interval=5"]
    clean = setting.train("run_id=clean", *validated)
    words = ["callback.fault.kind=raise", "callback.fault.at=10", "+callback.fault.where=validation"]
    once = f"callback.fault.once={setting.folder}/once"
    broken, run = setting.train("run_id=broken", *validated, *words, once), setting.run_of("broken")
    saved = checkpoints(run)
    resumed = setting.train("run_id=broken", *validated)
    apart = difference(run, setting.run_of("clean")) if resumed.code == 0 else float("inf")
    exported = _export(run)
    held = clean.code == 0 and broken.code == 1 and saved == [4, 8] and resumed.code == 0 and apart == 0
    figure = f"validation raised (exit {broken.code}); gone on: difference {apart:g}; export {exported}"
    return Result(held and exported == "is the average", figure, {"said": broken.text[-600:]})


def _export(run: Path) -> str:
    """Whether the weights that a run exported are its moving average, by the state that it ended with."""
    import torch
    from safetensors.torch import load_file

    state = torch.load(run / "seen" / "end-rank=0.pt", weights_only=True)
    exported = load_file(run / "weights.safetensors")
    average = {name: state[f"ema.module.{name}"] for name in exported if f"ema.module.{name}" in state}
    raw = {name: state[f"trained.{name}"] for name in exported}
    if len(average) != len(exported):
        return f"holds {len(exported)} tensors, the average {len(average)}"
    if all(torch.equal(exported[name], average[name]) for name in exported):
        return "is the average" if any(not torch.equal(raw[name], average[name]) for name in raw) else "cannot be told"
    return "is not the average"
