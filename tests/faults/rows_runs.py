"""Rows 33, 34 and 36: runs beside each other, on other processes than before, and without their loggers."""

from __future__ import annotations

import csv
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.faults.bench_child import Child, Setting, checkpoints, difference, samples_seen, steps_seen
from tests.faults.bench_row import Result, row

# By which sums of float32 in another order may differ after some steps.
TINY = 1e-5


@row(
    33,
    "two runs in one folder, a clock that jumps, two starts in the same second",
    must_hold="the second is refused in one line; the newest checkpoint stays the newest; each start its own folder",
    stock="folders named by the second collide",
)
def beside_each_other(setting: Setting) -> Result:
    first = setting.start(*setting.words("run_id=same", "callback.fault.pace=0.1"))
    first.until(lambda: steps_seen(setting.run_of("same")))
    second = setting.train("run_id=same")
    first.wait()
    refused = second.code == 2 and len(second.errors) == 1 and "is at work in this run folder" in second.errors[0]
    whole = len(steps_seen(setting.run_of("same"))) == 20
    clean, jumps = setting.clean("clean"), []
    for name, seconds in (("back", -86400.0), ("on", 86400.0)):
        setting.train(f"run_id={name}", "callback.fault.kind=SIGKILL", "callback.fault.at=10")
        run = setting.run_of(name)
        for step, when in zip(checkpoints(run), (time.time() + 3600, 0.0), strict=True):
            for path in (
                run / "checkpoints" / f"step={step:09d}.ckpt",
                *run.glob(f"checkpoints/step={step:09d}.ckpt/*"),
            ):
                os.utime(path, (when, when))
        resumed = jumped(setting, seconds, setting.words(f"run_id={name}"))
        jumps.append(resumed.code == 0 and steps_seen(run)[-12:][0] == 8 and difference(run, clean) == 0)
    together = [setting.start(*setting.words("resume=never", "trainer.max_steps=3")) for _ in range(3)]
    codes = sorted(child.wait().code for child in together)
    folders = [path.name for path in (setting.folder / "runs" / "faulty").glob("*") if (path / "result.json").exists()]
    held = refused and whole and all(jumps) and codes == [0] * len(together) and len(folders) == 3 + len(together)
    figure = (
        f"second run: exit {second.code}; clock jumps: {sum(jumps)}/2 bit for bit; {len(together)} starts in the same "
        f"moment: exits {codes}, {len(folders) - 3} folders"
    )
    return Result(held, figure, {"said": second.errors, "folders": folders})


def jumped(setting: Setting, seconds: float, words: list[str]) -> Any:
    """A command for which the clock has jumped."""

    def action() -> int:
        from ldm.cli.main import main

        real = time.time
        time.time = lambda: real() + seconds
        return main(words)

    return Child(action, setting.folder, {}).wait()


@row(
    34,
    "a run goes on with 1 process instead of 2, with 2 again, with other workers, with other accumulation",
    must_hold="the same samples in every step; weights equal to the order of summation; what changed is said",
    stock="other data",
)
def other_world(setting: Setting) -> Result:
    import ast

    # Adam turns rounding errors of gradients that are nearly zero into whole steps, and would hide what is to be seen.
    sgd = ["+model.optimizer=sgd"]
    clean, run, said = setting.clean("clean-sgd", *sgd), setting.run_of("moved"), []
    stages: list[tuple[int, int, list[str]]] = [
        (2, 5, []),
        (1, 9, ["data.num_workers=2"]),
        (1, 13, ["data.batch_size=3", "trainer.accumulate_grad_batches=2"]),
        (2, 20, ["data.num_workers=1"]),
    ]
    if setting.quick:
        stages = [(1, 5, []), *stages[1:3], (1, 20, [])]
    for processes, until, words in stages:
        train = setting.ranks if processes == 2 else setting.train
        outcome = train("run_id=moved", *sgd, f"trainer.max_steps={until}", *words)
        (run / "result.json").unlink(missing_ok=True)
        said.append([outcome.code, outcome.line("changed since the checkpoint")[:300]])
    samples: dict[int, list[Any]] = {}
    for rank in (0, 1):
        path = run / "seen" / f"rank={rank}.txt"
        for line in path.read_text().splitlines() if path.exists() else []:
            step, found = line.split(" ", 1)
            samples.setdefault(int(step), []).extend(ast.literal_eval(found))
    expected = {step: sorted(ast.literal_eval(found)) for step, found in samples_seen(clean).items()}
    same = {step: sorted(found) for step, found in samples.items()} == expected
    apart = difference(run, clean) if (run / "seen" / "end-rank=0.pt").exists() else float("inf")
    done = all(code == 0 for code, _ in said)
    changes = [a[0] != b[0] or "data.batch_size=3" in (*a[2], *b[2]) for a, b in pairwise(stages)]
    reported = all(line for (_, line), changed in zip(said[1:], changes, strict=True) if changed)
    figure = f"samples {'equal' if same else 'DIFFER'}, largest difference of weights and moments {apart:.1e}"
    return Result(done and same and apart < TINY and reported, figure, {"said": said})


@row(
    36,
    "a logger fails, metrics.csv cannot be written, a run is killed between rows, W&B is unreachable",
    must_hold="training goes on to the same weights, with one warning; metrics.csv has each step once after a resume",
    stock="CSVLogger deletes metrics.csv at a resume; a failing logger ends the run",
)
def loggers_down(setting: Setting) -> Result:
    clean = setting.clean("clean")
    broken = setting.train("run_id=broken", "+logger.broken._target_=faulty.BrokenLogger", "+logger.broken.after=5")
    goes_on = broken.code == 0 and difference(setting.run_of("broken"), clean) == 0
    warned = broken.text.count("the service is gone") == 1
    csv_gone = setting.start(*setting.words("run_id=csv", "callback.fault.pace=0.05"))
    table = setting.run_of("csv") / "metrics.csv"
    csv_gone.until(table.exists)
    table.unlink()
    table.mkdir()
    unwritable = csv_gone.wait()
    goes_on &= unwritable.code == 0 and difference(setting.run_of("csv"), clean) == 0
    warned &= unwritable.text.count("it logs no more, training goes on") == 1
    setting.train("run_id=killed", "callback.fault.kind=SIGKILL", "callback.fault.at=10")
    before = rows_of(setting.run_of("killed"))
    setting.train("run_id=killed")
    after, whole = rows_of(setting.run_of("killed")), rows_of(clean)
    appended = after == whole and len(before) > 0
    wandb = unreachable(setting)
    held = goes_on and warned and appended and wandb == "goes on"
    figure = (
        f"weights the same; metrics.csv {len(before)} rows before, {len(after)} after, of {len(whole)}; W&B {wandb}"
    )
    return Result(held, figure, {"broken": broken.text[-500:], "csv": unwritable.text[-500:]})


def rows_of(run: Path) -> list[tuple[str, str]]:
    """(step, loss) of each row of metrics.csv."""
    with (run / "metrics.csv").open() as file:
        return [(line["step"], line["train/loss"]) for line in csv.DictReader(file)]


def unreachable(setting: Setting) -> str:
    """What a run does whose W&B answered before a kill, and is not there when the run goes on."""
    words, run = ("run_id=wandb", "logger=wandb"), setting.run_of("wandb")
    setting.train(*words, "logger.wandb.offline=true", "callback.fault.kind=SIGKILL", "callback.fault.at=10")
    ids = [path.name.rpartition("faulty-")[2] for path in (run / "wandb").glob("offline-run-*")]
    # A port that nothing listens at.
    address = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    outcome = setting.train(*words, **address, WANDB_INIT_TIMEOUT="3")
    if outcome.code:
        return f"ends it with {outcome.code}: {outcome.text[-300:]}"
    said = outcome.line("it logs no more, training goes on")
    same = difference(run, setting.clean("clean")) == 0 and steps_seen(run)[-1] == 19
    return "goes on" if said and same and ids == ["wandb"] else f"said {said!r}, same {same}, ids {ids}"
