"""What processes that train together tell each other when one of them fails: in files, never by a collective."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ldm.files import write_text

# Set for the ranks that Lightning starts itself, and for no other.
ATTEMPT_VARIABLE = "LDM_ATTEMPT"
# What the communication library says on the ranks that did not fail.
_CONSEQUENCE = re.compile(r"[Cc]onnection (closed|reset|refused)|Broken pipe|[Tt]imed? ?out|NCCL|gloo|ProcessGroup")


class OtherRankFailed(Exception):
    """Another rank failed, and says so itself; this one ends without a word and with exit code 1."""


class Ranks:
    """One attempt's folder of what each rank has to say: that it is there, and how it failed.

    All ranks of a machine see each other's processes; those of several machines share the run folder, and learn of
    each other's failures as fast as that does.

    Args:
        folder: of the run; the attempt's lies in `.ranks` in it.
        rank, world_size: of this process.
    """

    def __init__(self, folder: str | os.PathLike[str], rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.folder = Path(folder) / ".ranks" / attempt()
        self.started = time.time()
        self._host = socket.gethostname()
        self._places: dict[int, dict[str, Any]] = {}

    def join(self) -> None:
        """Says that this rank is there; rank 0 clears earlier attempts away."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            for other in self.folder.parent.iterdir():
                if other != self.folder:
                    shutil.rmtree(other, ignore_errors=True)
        self._file("failed").unlink(missing_ok=True)
        write_text(self._file("here"), json.dumps({"process": os.getpid(), "host": self._host}))

    def leave(self) -> None:
        """Says that this rank ends as it should."""
        self._file("here").unlink(missing_ok=True)
        with suppress(OSError):  # others are still there, or something has failed
            self.folder.rmdir()
            self.folder.parent.rmdir()

    def tell(self, facts: Mapping[str, Any]) -> None:
        """Says, once, how this rank failed or what it was at when another did.

        On a full disk nothing is said: the others see this process end.
        """
        with suppress(OSError):
            if not self._file("failed").exists():
                write_text(self._file("failed"), json.dumps({"rank": self.rank, "at": time.time(), **facts}))

    def told(self) -> dict[int, dict[str, Any]]:
        """What the ranks have said, by rank; without what an earlier attempt left."""
        found = {}
        for rank in self._ranks_with("failed"):
            note = _read(self._file("failed", rank))
            if note is not None and note["at"] > self.started - 60:
                found[rank] = note
        return found

    def dead(self) -> list[int]:
        """Ranks of this machine whose processes are gone although they never left."""
        return [rank for rank, process in self._neighbours().items() if not alive(process)]

    def absent(self) -> list[int]:
        """Ranks that have not joined, or that have left."""
        return sorted(set(range(self.world_size)) - set(self._ranks_with("here")))

    def wait_for_all(self, seconds: float) -> dict[int, dict[str, Any]]:
        """What all ranks but the dead have said, or those that spoke within so many seconds."""
        end = time.monotonic() + seconds
        while True:
            notes = self.told()
            if len(notes) + len(self.dead()) >= self.world_size or time.monotonic() > end:
                return notes
            time.sleep(0.05)

    def claim(self) -> bool:
        """Whether this rank is the one that reports: the first to ask, and again when it asks again.

        Where nothing can be written each one is: better said twice than never.
        """
        try:
            with (self.folder / "reporter").open("x") as file:
                file.write(str(self.rank))
        except FileExistsError:
            return self._reporter() == self.rank
        except OSError:
            pass
        return True

    def wait_for_reporter(self, seconds: float) -> None:
        """Returns once the reporting rank has ended, or is this one; after so many seconds at most."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            reporter = self._reporter()
            if reporter == self.rank:
                return
            here = None if reporter is None else _read(self._file("here", reporter))
            if here and here["host"] == self._host and not alive(here["process"]):
                return
            time.sleep(0.05)

    def _neighbours(self) -> dict[int, int]:
        """Processes of the ranks of this machine that are there, by rank."""
        present = self._ranks_with("here")
        for rank in present:
            if rank not in self._places and (place := _read(self._file("here", rank))):
                self._places[rank] = place
        places = {rank: self._places[rank] for rank in present if rank in self._places}
        return {rank: place["process"] for rank, place in places.items() if place["host"] == self._host}

    def _ranks_with(self, what: str) -> list[int]:
        """Ranks that have a file of this kind: one look at the folder, however many ranks there are."""
        with suppress(OSError):
            names = [path.name.partition(".") for path in self.folder.iterdir()]
            return sorted(int(rank) for rank, _, kind in names if kind == what)
        return []

    def _reporter(self) -> int | None:
        with suppress(OSError, ValueError):
            return int((self.folder / "reporter").read_text())
        return None

    def _file(self, what: str, rank: int | None = None) -> Path:
        return self.folder / f"{self.rank if rank is None else rank}.{what}"


def failing_rank(notes: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Which rank failed, of what all said: the first with an error of its own, of equal errors the lowest rank's.

    None where all errors are what the communication library says when another rank is gone.
    """
    own = [note for note in notes.values() if note.get("error") and not is_consequence(note["error"])]
    if not own:
        return None
    first = min(own, key=lambda note: note["at"])
    return min(int(note["rank"]) for note in own if note["error"] == first["error"])


def is_consequence(error: str) -> bool:
    """Whether an error is what the other ranks get when one is gone."""
    return _CONSEQUENCE.search(error) is not None


def attempt() -> str:
    """A name that all ranks of one start share, and no earlier or later start has."""
    if ATTEMPT_VARIABLE in os.environ:
        return os.environ[ATTEMPT_VARIABLE]
    names = ["TORCHELASTIC_RUN_ID", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"]
    if _on_one_machine():  # of several each counts restarts by itself
        names.append("TORCHELASTIC_RESTART_COUNT")
    parts = [os.environ[name] for name in names if name in os.environ]
    if _on_one_machine():
        parts.append(str(os.getppid()))  # torchrun, which started all of them
    return "-".join(re.sub(r"\W", "_", part) for part in parts) or f"process_{os.getpid()}"


def meet_anew() -> None:
    """Has ranks that torchrun started again on one machine meet at a store of their own, before they join their group.

    torchrun's store still has the addresses of the attempt before, which a rank may read and find nobody at (PyTorch
    issue 135712). On several machines torchrun itself has to be told, and a warning says so before it matters.
    """
    variables, restart = os.environ, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if variables.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    if not _on_one_machine():
        if variables.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and restart == variables["RANK"] == "0":
            warnings.warn(
                "torchrun on several machines: ranks that start again may look for each other at the addresses of "
                "those before; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, on each machine",
                stacklevel=2,
            )
        return
    if restart == "0":
        return
    common = dist.TCPStore(variables["MASTER_ADDR"], int(variables["MASTER_PORT"]), is_master=False)
    if variables["RANK"] == "0":
        common.set(f"ldm/port/{restart}", str(free_port()))
    variables["MASTER_PORT"] = common.get(f"ldm/port/{restart}").decode()
    variables["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def _on_one_machine() -> bool:
    """Whether torchrun started all ranks here."""
    here = os.environ.get("LOCAL_WORLD_SIZE")
    return here is not None and here == os.environ.get("WORLD_SIZE")


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def alive(process: int) -> bool:
    """Whether a process of this machine is at work; one that has ended and that nobody has asked about is not."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True  # not a Linux
    return state not in ("Z", "X")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content
