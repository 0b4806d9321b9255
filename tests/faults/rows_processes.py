"""Rows 1 and 8 to 14: processes that are killed, signalled, fail or hang."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from tests.faults.bench_child import (
    Outcome,
    Setting,
    checkpoints,
    children,
    difference,
    in_time,
    num_tracebacks,
    runs,
    same_metrics,
    slowness,
    steps_seen,
)
from tests.faults.bench_row import Result, row, shares

PACED = "callback.fault.pace=0.02"
STEPS = 20
TWO_CLEAN = ("clean-two",)


@row(
    1,
    "kill -9 in the middle of a step",
    must_hold="the same command goes on; weights, average, moments, metrics.csv bit for bit as undisturbed",
    stock="loses what came after the last checkpoint; a batch dropped at every resume; no random state kept",
)
def kill_in_a_step(setting: Setting) -> Result:
    clean, times = setting.clean("clean"), random.Random(0)
    equal, lost, back = [], [], []
    for trial in range(setting.trials(20, 2)):
        run = setting.run_of(f"t{trial}")
        child = setting.start(*setting.words(f"run_id=t{trial}", PACED))
        # By steps, which come faster or slower with the machine, and then anywhere within one.
        last = times.randrange(1, STEPS - 1)
        child.until(lambda run=run, last=last: len(steps_seen(run)) >= last)
        time.sleep(times.uniform(0.0, 0.03))
        child.signal(signal.SIGKILL)
        killed = child.wait().code == -signal.SIGKILL
        before = steps_seen(run)
        started = time.monotonic()
        child = setting.start(*setting.words(f"run_id=t{trial}", PACED))
        child.until(lambda run=run, before=before: len(steps_seen(run)) > len(before))
        back.append(time.monotonic() - started)
        done = child.wait()
        after = steps_seen(run)[len(before) :]
        lost.append(before[-1] - after[0])
        ended = killed and done.code == 0
        equal.append(ended and difference(run, clean) == 0 and same_metrics(run, clean))
    figure = (
        f"{shares(equal)} bit for bit, metrics.csv too; at most {max(lost)} steps done again, back in {max(back):.1f} s"
    )
    # A checkpoint every 4 steps: what is lost lies behind the newest one, and the step under way.
    return Result(all(equal) and max(lost) <= 4, figure, {"steps_lost": lost, "seconds_to_go_on": back})


@row(
    8,
    "SIGTERM at any time, one process",
    must_hold="the step ends, a checkpoint is saved, exit 143; the same command goes on bit for bit",
    stock="exit 143, nothing saved",
)
def terminated(setting: Setting) -> Result:
    clean, times = setting.clean("clean"), random.Random(1)
    held, grace = [], []
    for trial in range(setting.trials(5, 1)):
        run = setting.run_of(f"t{trial}")
        child = setting.start(*setting.words(f"run_id=t{trial}", PACED))
        child.until(lambda run=run: steps_seen(run))
        time.sleep(times.uniform(0.0, 0.25))
        sent = time.monotonic()
        child.signal(signal.SIGTERM)
        stopped = child.wait()
        grace.append(time.monotonic() - sent)
        saved = checkpoints(run)[-1] - steps_seen(run)[-1] in (0, 1)
        resumed = setting.train(f"run_id=t{trial}")
        held.append(stopped.code == 143 and saved and resumed.code == 0 and difference(run, clean) == 0)
    return Result(all(held), f"{shares(held)} bit for bit, ended {max(grace):.2f} s after the signal", {"grace": grace})


@row(
    9,
    "SIGUSR1 and SIGUSR2 of SLURM, with a stand-in for scontrol",
    must_hold="saved in the loop and not in the handler; requeued exactly once; goes on bit for bit",
    stock="saves inside the handler, which may never end (issue 21406)",
)
def requeued(setting: Setting) -> Result:
    clean, held, calls = setting.clean("clean"), [], []
    for name in ("SIGUSR1", "SIGUSR2"):
        environment = fake_slurm(setting.folder / name)
        words = (f"run_id={name}", f"callback.fault.kind={name}", "callback.fault.at=6")
        stopped = setting.train(*words, **environment)
        asked = (setting.folder / name / "calls").read_text().splitlines()
        calls.append(asked)
        saved = checkpoints(setting.run_of(name))[-1] == 7
        resumed = setting.train(f"run_id={name}", **environment)
        right = stopped.code == 143 and asked == ["show job 4711", "requeue 4711"] and saved and resumed.code == 0
        held.append(right and difference(setting.run_of(name), clean) == 0)
    return Result(all(held), f"{shares(held)}; requeued {[len(asked) - 1 for asked in calls]} times", {"calls": calls})


def fake_slurm(folder: Path) -> dict[str, str]:
    """The environment of a job, and a scontrol that notes what it is asked."""
    folder.mkdir()
    script = f'#!/bin/sh\necho "$@" >> {folder}/calls\n[ "$1" = show ] && echo "JobId=4711 Requeue=1" || exit 0\n'
    (folder / "scontrol").write_text(script)
    (folder / "scontrol").chmod(0o755)
    tasks = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "train"}
    job = {f"SLURM_{name}": value for name, value in {**tasks, "JOB_ID": "4711", "NODELIST": "localhost"}.items()}
    return {**job, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@row(
    10,
    "SIGTERM to rank 1 alone, two processes",
    must_hold="both stop at the same step, saved, exit 143; both go on bit for bit",
    stock="hangs to the process group's timeout (40 s of 40 s; 30 min by default)",
)
def one_rank_terminated(setting: Setting) -> Result:
    clean, run, once = setting.clean(*TWO_CLEAN, two=True), setting.run_of("one"), setting.folder / "once"
    words = ("run_id=one", "callback.fault.kind=SIGTERM", "callback.fault.at=5", "callback.fault.rank=1")
    stopped = setting.ranks(*words, f"callback.fault.once={once}")
    ended = time.time() - float(once.read_text())
    steps = [steps_seen(run, rank)[-1] for rank in (0, 1)]
    saved = checkpoints(run)[-1]
    resumed = setting.ranks("run_id=one")
    apart = [difference(run, clean, rank=rank) for rank in (0, 1)]
    prompt, words_of_time = in_time(ended, 15)
    held = (
        stopped.code == 143
        and len(set(steps)) == 1
        and saved - steps[0] in (0, 1)
        and resumed.code == 0
        and not any(apart)
        and prompt
    )
    figure = f"exit {stopped.code} after {words_of_time}, steps {steps}, saved {saved}; difference {max(apart):g}"
    return Result(held, figure, {"seconds": ended})


def fault_on_a_rank(setting: Setting, run_id: str, *words: str, restarts: int | None = None) -> tuple[Outcome, float]:
    """Two ranks in which something happens to one; how they ended, and how many seconds behind it."""
    once = setting.folder / f"once-{run_id}"
    child = setting.start_ranks(
        f"run_id={run_id}", "callback.fault.at=6", f"callback.fault.once={once}", *words, restarts=restarts
    )
    outcome = child.wait()
    if not once.exists():
        raise RuntimeError(f"the fault never came: {outcome.text[-1500:]}")
    return outcome, time.time() - float(once.read_text())


@row(
    11,
    "kill -9 of rank 1, of rank 0, two processes",
    must_hold="torchrun starts both again, which go on bit for bit; without it all end at once, with one message",
    stock="0.1 s error on rank 0, exit 1; no exact resume",
)
def a_rank_killed(setting: Setting) -> Result:
    clean = setting.clean(*TWO_CLEAN, two=True)
    words = ("callback.fault.kind=SIGKILL", "callback.fault.rank=1")
    again, took = fault_on_a_rank(setting, "torchrun", *words, restarts=1)
    apart = [difference(setting.run_of("torchrun"), clean, rank=rank) for rank in (0, 1)]
    details: dict[str, Any] = {"torchrun": [again.code, took, again.text[-1500:]]}
    held = again.code == 0 and not any(apart) and again.text.count("ended without a word") == 1
    for rank in (1,) if setting.quick else (0, 1):
        ended, seconds = fault_on_a_rank(setting, f"rank{rank}", words[0], f"callback.fault.rank={rank}")
        details[f"rank {rank}"] = [ended.code, seconds, ended.errors]
        said = len(ended.errors) == 1 and f"rank {rank} of 2 ended without a word" in ended.errors[0]
        held &= ended.code != 0 and said and not ended.left and not num_tracebacks(ended.text)
    prompt, within = in_time(max(value[1] for name, value in details.items() if name != "torchrun"), 10)
    figure = f"restarted and done in {took:.0f} s, difference {max(apart):g}; else all ended within {within}"
    return Result(held and prompt, figure, details)


@row(
    12,
    "rank 1 raises, rank 0 raises, two processes",
    must_hold="all end within 5 s with one traceback that names rank and step; no collective on the way",
    stock="0.4 s; 40 s of 40 s (30 min by default) with ModelCheckpoint(save_on_exception=True)",
)
def a_rank_raises(setting: Setting) -> Result:
    held, details = True, {}
    for rank in (1,) if setting.quick else (1, 0):
        words = ("callback.fault.kind=raise", f"callback.fault.rank={rank}")
        outcome, seconds = fault_on_a_rank(setting, f"rank{rank}", *words)
        said = f"rank {rank} of 2, at step 6, failed; rank {1 - rank} was at step 6"
        held &= outcome.code == 1 and num_tracebacks(outcome.text) == 1 and said in outcome.text and not outcome.left
        details[f"rank {rank}"] = [outcome.code, round(seconds, 1), num_tracebacks(outcome.text)]
    prompt, within = in_time(max(value[1] for value in details.values()), 5)
    return Result(held and prompt, f"all ended within {within}, one traceback", details)


@row(
    13,
    "rank 1 hangs, also without giving Python a turn, before the first step, or stopped; so does a single process",
    must_hold="stacks of all threads in the run folder and the end, `hang_timeout` seconds later; one message",
    stock="the process group's timeout: 40 s of 40 s, 30 min by default; no stacks",
)
def a_rank_hangs(setting: Setting) -> Result:
    timeout, held, details = 3, True, {}
    for kind in ("hang",) if setting.quick else ("hang", "hold"):
        words = (f"callback.fault.kind={kind}", "callback.fault.rank=1", f"callback.watchdog.hang_timeout={timeout}")
        outcome, seconds = fault_on_a_rank(setting, kind, *words)
        stacks = [path.read_text() for path in sorted((setting.run_of(kind) / "stacks").glob("rank=*.txt"))]
        held &= outcome.code == 1 and len(stacks) == 2 and "_strike" in stacks[1]
        blamed = outcome.errors[0].split(";")[0] if len(outcome.errors) == 1 else ""
        held &= ("rank 1 of 2" if kind == "hang" else "of 2 ranks 1 ") in blamed and not outcome.left
        details[kind] = [round(seconds, 1), outcome.errors]
    hang = ("callback.fault.kind=hang", f"callback.watchdog.hang_timeout={timeout}")
    at_start = ("+callback.fault.where=start", f"callback.watchdog.start_timeout={timeout}")
    for name, at, words in (("single", 6, ()), ("start", 0, at_start)):
        single = setting.train(f"run_id={name}", f"callback.fault.at={at}", *hang, *words)
        said = f"at step {at}, in _strike (faulty.py"
        held &= single.code == 1 and len(single.errors) == 1 and said in single.errors[0]
    if not setting.quick:
        held &= _hangs_before_the_first_step(setting, hang, details)
        words = ("callback.fault.kind=SIGSTOP", "callback.fault.rank=1", f"callback.watchdog.hang_timeout={timeout}")
        stopped, seconds = fault_on_a_rank(setting, "stopped", *words)
        details["stopped"] = [round(seconds, 1), stopped.errors]
        held &= stopped.code == 1 and "of 2 ranks 1 says nothing" in "".join(stopped.errors) and not stopped.left
    prompt, within = in_time(max(value[0] for name, value in details.items() if name != "start") - timeout, 6)
    figure = f"hang_timeout={timeout} s, and then ended within {within}, stacks of both ranks"
    return Result(held and prompt, figure, details)


def _hangs_before_the_first_step(setting: Setting, hang: tuple[str, ...], details: dict[str, Any]) -> bool:
    """Whether two ranks, of which one never comes to its first step, end with one message and stacks."""
    # From the launch of the second rank on, which imports everything.
    limit = f"callback.watchdog.start_timeout={30 * slowness():.0f}"
    words = ("callback.fault.at=0", "callback.fault.rank=1", "+callback.fault.where=start", limit)
    outcome = setting.ranks("run_id=start-two", *hang, *words)
    stacks = setting.run_of("start-two") / "stacks" / "rank=1.txt"
    details["start"] = [round(outcome.seconds, 1), outcome.errors]
    one = len(outcome.errors) == 1 and "rank 1 of 2, at step 0, hangs in _strike" in outcome.errors[0]
    return outcome.code == 1 and one and stacks.is_file() and "_strike" in stacks.read_text() and not outcome.left


@row(
    14,
    "a worker of the data loader is killed",
    must_hold="the loader starts again at the same place, up to 3 times; bit for bit",
    stock="RuntimeError, the run ends",
)
def a_worker_killed(setting: Setting) -> Result:
    clean, run = setting.clean("clean"), setting.run_of("workers")
    child = setting.start(
        *setting.words("run_id=workers", "data.num_workers=2", "data.workers=processes", "callback.fault.pace=0.1")
    )
    killed = 0
    for step in (2, 7):
        child.until(lambda step=step: len(steps_seen(run)) > step)
        workers = children(child.process)
        if workers:
            os.kill(workers[0], signal.SIGKILL)
            killed += 1
    outcome = child.wait()
    apart = difference(run, clean) if outcome.code == 0 else float("inf")
    again = outcome.text.count("start again, time")
    held = outcome.code == 0 and apart == 0 and killed == again == 2
    if setting.quick:
        return Result(held, f"{killed} killed: difference {apart:g}")
    often = setting.start(
        *setting.words("run_id=often", "data.num_workers=1", "data.workers=processes", "trainer.max_steps=900")
    )
    # From its first step on: before, children are those of git, which says what is run.
    often.until(lambda: steps_seen(setting.run_of("often")))
    num_killed = 0
    while runs(often.process):
        for worker in children(often.process):
            os.kill(worker, signal.SIGKILL)
            num_killed += 1
        time.sleep(0.3)
    gave_up = often.wait()
    said = "worker" in gave_up.text.splitlines()[-1] and gave_up.text.count("start again, time") == 3
    held &= gave_up.code == 1 and said
    figure = (
        f"{killed} workers killed: exit {outcome.code}, difference {apart:g}; {num_killed} more, one after the "
        f"other: exit {gave_up.code}"
    )
    return Result(held, figure, {"said": outcome.text[-800:], "gave_up": gave_up.text[-800:]})
