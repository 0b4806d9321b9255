"""Rows 2 to 7: what happens while checkpoints are saved, and to those that lie there."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

from tests.faults.bench_child import Setting, checkpoints, difference, steps_seen
from tests.faults.bench_row import Result, row, shares


@row(
    2,
    "kill -9 in the middle of a save, same file system",
    must_hold="the old one or the new one is there, whole; two valid ones; nothing left over at the next start",
    stock="12 of 12 survived, 6 temporaries of 130 to 289 MB left over",
)
def killed_while_saving(setting: Setting) -> Result:
    import checkpoint_trials as trials

    actions = (trials.write_over, trials.save_and_remove, trials.seal_and_replace)

    def inject() -> dict[str, Any]:
        count = setting.trials(50, 5)
        return {one.__name__: trials.kill_in_save(setting.folder / one.__name__, one, trials=count) for one in actions}

    found = setting.call(inject).values()
    killed = [dead for one in found for dead in one["killed"]]
    whole = [step in (2, 3) and not damaged for one in found for step, damaged in zip(one["step"], one["damaged"])]  # noqa: B905
    litter = [names for one in found for names in one["litter"] if names]
    valid = min(number for one in found for number in one["valid"])
    held = all(killed) and all(whole) and valid >= 2 and not litter
    figure = f"{shares(whole)} whole, at least {valid} valid, {len(litter)} left anything over"
    return Result(held, figure, {"swept": sum(number for one in found for number in one["swept"])})


@row(
    3,
    "kill -9 at any time in a save, TMPDIR on another file system",
    must_hold="none destroyed, nothing left over in TMPDIR",
    stock="4 of 24 destroyed the existing good checkpoint",
)
def killed_with_tmpdir_elsewhere(setting: Setting) -> Result:
    import checkpoint_trials as trials

    count = setting.trials(50, 10)
    found = setting.call(lambda: trials.kill_at_any_time(_made(setting.folder / "any"), trials=count, shortest=0.4))
    other = trials.SHARED_MEMORY.stat().st_dev != setting.folder.stat().st_dev
    saved = found["steps"][-1] - 1
    held = found["destroyed"] == 0 and not found["litter"] and saved > 0 and found["steps"] == sorted(found["steps"])
    elsewhere = "another" if other else "the same"
    figure = f"{found['destroyed']}/{count} destroyed (TMPDIR on {elsewhere} file system), {saved} saves came through"
    return Result(held and other, figure, found)


@row(
    4,
    "the disk fills up in a save",
    must_hold="the run ends within a step, with the bytes needed in the message and 2 valid checkpoints",
    stock="ends, the old one kept; AsyncCheckpointIO: up to two saves later and none left",
)
def disk_full(setting: Setting) -> Result:
    import checkpoint_trials as trials

    kinds = (trials.AtomicCheckpointIO, trials.BackgroundCheckpointIO)

    def inject() -> dict[str, Any]:
        return {kind.__name__: trials.fill_the_disk(setting.folder / kind.__name__, kind) for kind in kinds}

    found = setting.call(inject)
    late = {name: one["steps"] - 15 for name, one in found.items()}
    valid = min(one["valid"] for one in found.values())
    said = all("it needs" in one["said"] and "\n" not in one["said"] for one in found.values())
    held = said and valid >= 2 and max(late.values()) <= 1
    return Result(held, f"{max(late.values())} steps late, {valid} valid left, sync and background", found)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _two_checkpoints(folder: Path) -> Path:
    """Checkpoints of steps 1 and 2; returns the second."""
    import checkpoint_trials as trials

    for step in (1, 2):
        trials.AtomicCheckpointIO().save_checkpoint(trials.state(step), folder / f"step={step}.ckpt")
    return folder / "step=2.ckpt"


@row(
    5,
    "a bit of a checkpoint flips",
    must_hold="found, said, and the checkpoint before it is used",
    stock="loads silently, or an error of the zip reader",
)
def bit_flips(setting: Setting) -> Result:
    from ldm.training.checkpoint_folders import newest_valid

    newest, places, count = _two_checkpoints(setting.folder), random.Random(0), setting.trials(100, 40)
    files, found = sorted(newest.iterdir()), []
    for trial in range(count):
        file, reasons = files[trial % len(files)], []
        whole = file.read_bytes()
        changed = bytearray(whole)
        changed[places.randrange(len(whole))] ^= 1 << places.randrange(8)
        file.write_bytes(changed)
        used = newest_valid(setting.folder, on_damaged=lambda place, why, reasons=reasons: reasons.append(why))
        found.append(used is not None and Path(used).name == "step=1.ckpt" and len(reasons) == 1)
        file.write_bytes(whole)
    back = newest_valid(setting.folder)
    return Result(all(found) and back == newest, f"{shares(found)} detected, in {len(files)} files")


@row(
    6,
    "a checkpoint is truncated",
    must_hold="the run goes on from the one before it, and ends bit for bit as an undisturbed one",
    stock="the run dies with an error",
)
def truncated(setting: Setting) -> Result:
    clean, found = setting.clean("clean"), []
    run = setting.run_of("cut")
    setting.train("run_id=cut", "callback.fault.kind=SIGKILL", "callback.fault.at=10")
    newest = run / "checkpoints" / f"step={checkpoints(run)[-1]:09d}.ckpt"
    shutil.copytree(run, setting.folder / "before")
    names = sorted(path.name for path in newest.iterdir())
    for trial in range(setting.trials(10, 2)):
        shutil.rmtree(run)
        shutil.copytree(setting.folder / "before", run)
        file = newest / names[trial % len(names)]
        os.truncate(file, int(file.stat().st_size * (0.0, 0.5, 0.999)[trial % 3]))
        outcome = setting.train("run_id=cut")
        said = "is damaged; going back to an older checkpoint" in outcome.text
        first = steps_seen(run)[-16:][0]
        found.append(outcome.code == 0 and said and first == 4 and difference(run, clean) == 0)
    return Result(all(found), f"{shares(found)} recovered bit for bit from the checkpoint before")


@row(
    7,
    "the checkpoint folder cannot be written, vanishes, or becomes a file in mid-run",
    must_hold="said before the first step, exit 4; one that vanishes is made again; a file ends the run with 4",
    stock="ends with a traceback at the first save",
)
def folder_gone(setting: Setting) -> Result:
    (setting.folder / "file").touch()
    at_start = setting.train("run_id=start", f"callback.checkpoint.folder={setting.folder}/file/checkpoints")
    early = at_start.code == 4 and len(at_start.errors) == 1 and not steps_seen(setting.run_of("start"))

    def disturb(run_id: str, then_file: bool) -> tuple[int, list[int], list[str], float]:
        run = setting.run_of(run_id)
        child = setting.start(*setting.words(f"run_id={run_id}", "callback.fault.pace=0.05"))
        child.until(lambda: (run / "checkpoints" / "step=000000004.ckpt").exists() and len(steps_seen(run)) >= 6)
        shutil.rmtree(run / "checkpoints")
        if then_file:
            (run / "checkpoints").touch()
        since = time.monotonic()
        outcome = child.wait()
        return outcome.code, checkpoints(run), outcome.errors, time.monotonic() - since

    vanished, replaced = disturb("vanished", False), disturb("replaced", True)
    held = early and vanished[0] == 0 and vanished[1][-1:] == [20] and replaced[0] == 4 and len(replaced[2]) == 1
    figure = (
        f"at the start exit {at_start.code} after {at_start.seconds:.1f} s; vanished: exit {vanished[0]}; "
        f"a file: exit {replaced[0]} after {replaced[3]:.1f} s"
    )
    return Result(held, figure, {"said": [*at_start.errors, *replaced[2]]})
