"""A process that hangs, or whose ranks fail, ends with one message; what only takes long does not."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch.distributed as dist

from ldm.training.callbacks import Watchdog
from ldm.training.callbacks.cadence import outside_training
from ldm.training.callbacks.watchdog import _hanging
from ldm.training.ranks import Ranks, alive, attempt, failing_rank, is_consequence, meet_anew

ROOT = Path(__file__).resolve().parents[3]


SCENARIOS = """
import ctypes, json, sys, threading, time
from pathlib import Path
from ldm.training.callbacks import Watchdog
from tests.faults.bench_child import Child

class Trainer:
    global_step, world_size = 7, 1

def hangs(dog):
    threading.Thread(target=other, daemon=True).start()
    dog.on_train_batch_start(Trainer)
    time.sleep(60)

def other():
    time.sleep(60)

def holds(dog):
    dog.on_train_batch_start(Trainer)
    time.sleep(0.2)
    ctypes.PyDLL(None).sleep(60)

def holds_early(dog):
    time.sleep(0.2)
    dog.on_train_batch_end(Trainer)
    ctypes.PyDLL(None).sleep(60)

def never_starts(dog):
    time.sleep(60)

def takes_long(dog):
    time.sleep(1.4)
    dog.on_train_batch_start(Trainer)
    time.sleep(1.4)
    for _ in range(4):
        dog.on_train_batch_end(Trainer)
        time.sleep(0.2)
    with dog.patient():
        time.sleep(1.4)
    dog.on_save_checkpoint(Trainer, None, {})
    time.sleep(1.4)
    dog.teardown(Trainer, None, "fit")
    time.sleep(2.4)

def watched(scenario, folder):
    start_timeout = 60 if scenario is holds_early else 2
    dog = Watchdog(folder, hang_timeout=1, start_timeout=start_timeout, poll_seconds=0.05)
    with dog.watching():
        dog.follow(Trainer)
        if scenario in (hangs, holds):
            dog.on_train_batch_end(Trainer)
        scenario(dog)

def start(scenario):
    folder = Path(sys.argv[1]) / scenario.__name__
    folder.mkdir()
    return Child(lambda: watched(scenario, folder), folder.parent, {})

children = {scenario.__name__: start(scenario) for scenario in (hangs, holds, holds_early, never_starts, takes_long)}
outcomes = {name: child.wait(60) for name, child in children.items()}
print(json.dumps({name: [outcome.code, outcome.text] for name, outcome in outcomes.items()}))
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """How watched blocks ended, each in a process of its own, and where."""
    folder = tmp_path_factory.mktemp("watchdog")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCENARIOS, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout)


@pytest.mark.slow
def test_a_block_without_steps_ends_with_1_and_the_stacks_of_all_threads(ended: tuple[Path, dict[str, Any]]) -> None:
    folder, (code, said) = ended[0] / "hangs", ended[1]["hangs"]
    assert code == 1
    where = f"at step 7, in hangs (<string>:13); the stacks of all threads are in {folder}/stacks\n"
    assert said.startswith("error: nothing has happened for ") and said.endswith(where)
    assert said.count("\n") == 1
    stacks = (folder / "stacks" / "rank=0.txt").read_text()
    assert "in other" in stacks
    assert "in hangs" in stacks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["holds", "holds_early"])
def test_a_step_that_gives_python_no_turn_ends_too(name: str, ended: tuple[Path, dict[str, Any]]) -> None:
    """Also the one right after the first, which may take longer."""
    assert ended[1][name][0] == 1
    assert f"in {name}" in (ended[0] / name / "stacks" / "rank=0.txt").read_text()


@pytest.mark.slow
def test_a_first_step_that_never_comes_is_a_hang(ended: tuple[Path, dict[str, Any]]) -> None:
    code, said = ended[1]["never_starts"]
    assert code == 1
    assert said.startswith("error: nothing has happened for 2 s at step 0, in never_starts")


@pytest.mark.slow
def test_steps_saves_pictures_a_first_step_and_the_time_after_training_may_take_long(
    ended: tuple[Path, dict[str, Any]],
) -> None:
    assert ended[1]["takes_long"] == [0, ""]
    assert list((ended[0] / "takes_long").iterdir()) == []


def test_pictures_and_metrics_are_outside_training() -> None:
    watchdog = Watchdog("nowhere", hang_timeout=3)
    trainer: Any = pl.Trainer(callbacks=[watchdog], logger=False, enable_checkpointing=False, accelerator="cpu")
    watchdog.on_train_batch_end(trainer)

    def seconds() -> float:
        assert watchdog._awaited is not None
        return round(watchdog._awaited[1] - watchdog._awaited[0])

    with outside_training(trainer):
        assert seconds() == 30
    assert seconds() == 3


def test_the_stacks_of_the_hang_before_this_start_are_kept(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks"
    stacks.mkdir()
    (stacks / "rank=0.txt").write_text("in all_reduce")
    Watchdog(tmp_path)._open_stacks().close()
    assert (stacks / "rank=0.before.txt").read_text() == "in all_reduce"


@pytest.mark.parametrize("name", ["hang_timeout", "start_timeout", "poll_seconds"])
def test_seconds_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 0, expected seconds above 0"):
        Watchdog("nowhere", **{name: 0})


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[[int], Ranks]:
    def make(rank: int) -> Ranks:
        ranks = Ranks(tmp_path, rank, 3)
        ranks.join()
        return ranks

    return make


def test_ranks_hear_each_other_and_one_reports(ranks: Callable[[int], Ranks]) -> None:
    first, second, third = map(ranks, range(3))
    second.tell({"error": "ValueError: of its own", "step": 4})
    third.tell({"error": "RuntimeError: [gloo] Connection closed by peer", "step": 4})
    first.tell({"step": 4, "waits": "all_reduce"})
    assert first.wait_for_all(5).keys() == {0, 1, 2}
    assert failing_rank(first.told()) == 1
    assert [rank.claim() for rank in (second, first, third, second)] == [True, False, False, True]


def test_of_equal_errors_the_lowest_rank_s_counts_and_consequences_do_not() -> None:
    both = {rank: {"rank": rank, "at": 10.0 - rank, "error": "KeyError: 'x'"} for rank in (0, 1)}
    assert failing_rank(both) == 0
    assert failing_rank({1: {"rank": 1, "at": 0.0, "error": "RuntimeError: Connection reset by peer"}}) is None
    assert is_consequence("DistBackendError: NCCL communicator was aborted")
    assert not is_consequence("ValueError: shapes differ")


def test_what_an_earlier_attempt_said_counts_no_more(ranks: Callable[[int], Ranks]) -> None:
    ranks(1).tell({"error": "ValueError: before", "step": 4})
    later = ranks(0)
    later.started += 120
    assert later.told() == {}
    assert ranks(1).told() == {}, "a rank that starts again takes its own words back"


def test_a_process_that_is_gone_is_dead_unless_it_left(ranks: Callable[[int], Ranks]) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    first, second = ranks(0), ranks(1)
    assert first.absent() == [2]
    second._file("here").write_text(second._file("here").read_text().replace(str(os.getpid()), str(gone.pid)))
    assert first.dead() == [1]
    second.leave()
    assert first.dead() == []
    assert not alive(gone.pid)
    assert alive(os.getpid())


def test_a_start_has_one_name_for_all_ranks_and_another_at_each_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    found = []
    for restart in "01":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        found.append(attempt())
    assert found == [f"none-29500-{restart}-{os.getppid()}" for restart in "01"]
    # On several machines each torchrun counts the restarts of its own ranks.
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert attempt() == "none-29500"
    monkeypatch.setenv("LDM_ATTEMPT", "mine")
    assert attempt() == "mine"


def test_ranks_that_torchrun_starts_again_meet_at_a_new_port(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    names |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RESTART_COUNT": "0"}
    ports = {}
    for rank, restart in (("0", "0"), ("0", "1"), ("1", "1"), ("0", "2"), ("1", "2")):
        places = {"MASTER_PORT": str(agent.port), "RANK": rank, "TORCHELASTIC_RESTART_COUNT": restart}
        for name, value in {**names, **places}.items():
            monkeypatch.setenv(name, value)
        meet_anew()
        ports[rank, restart] = os.environ["MASTER_PORT"]
        assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == str(restart == "0")
    assert ports["0", "0"] == str(agent.port)
    assert ports["0", "1"] == ports["1", "1"] != str(agent.port)
    assert ports["0", "2"] == ports["1", "2"] not in (ports["0", "1"], str(agent.port))


@pytest.mark.parametrize(("restarts", "shared", "warned"), [("3", "True", 1), ("0", "True", 0), ("3", "False", 0)])
def test_torchrun_on_several_machines_is_told_what_restarts_need(
    restarts: str, shared: str, warned: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    names = {"TORCHELASTIC_USE_AGENT_STORE": shared, "TORCHELASTIC_MAX_RESTARTS": restarts, "RANK": "0"}
    for name, value in {**names, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    meet_anew()
    assert len([one for one in recwarn if "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in str(one.message)]) == warned


def test_on_a_full_disk_a_rank_that_fails_keeps_its_own_error(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """Nothing can be told; each rank that is asked reports."""
    first, second = ranks(0), ranks(1)
    shutil.rmtree(first.folder)
    first.folder.parent.rmdir()
    (tmp_path / ".ranks").touch()
    first.tell({"error": "StorageError: no room", "step": 4})
    assert [rank.claim() for rank in (first, second)] == [True, True]
    assert second.told() == {}


def test_the_rank_that_the_others_wait_for_is_named(ranks: Callable[[int], Ranks]) -> None:
    """One that never came, one that gave no turn, or the one that came least far and waits for nobody."""
    notes = {
        0: {"rank": 0, "step": 4, "order": [5, 0, True], "waits": "step (a.py:1)"},
        1: {"rank": 1, "step": 4, "order": [5, 0, False], "waits": "read (b.py:2)"},
        2: {"rank": 2, "step": 4, "order": [6, 0, False], "waits": "c (d.py:3)"},
    }
    whole = _hanging(notes, [], [], ranks(0))
    others = "rank 0 was at step 4, in step (a.py:1); rank 2 was at step 4, in c (d.py:3)"
    assert whole == f"rank 1 of 3, at step 4, hangs in read (b.py:2); {others}"
    del notes[2]
    for gone, absent, fault in (([2], [], "gave Python no turn"), ([], [2], "never came to this run folder")):
        assert _hanging(notes, gone, absent, ranks(0)).startswith(f"of 3 ranks 2 {fault}; rank 0 was at step 4")
    assert _hanging(notes, [], [], ranks(0)).startswith("of 3 ranks 2 says nothing; rank 0 was")


def test_an_error_of_one_process_passes_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Watchdog(tmp_path).watching():
        raise KeyError("x")
    assert list(tmp_path.iterdir()) == []
